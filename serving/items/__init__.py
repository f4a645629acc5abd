"""What can be recommended: the catalogue, its trie, the rules of a request, and what follows or resembles an item."""
