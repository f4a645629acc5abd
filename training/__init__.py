"""From interactions to a bundle: data, semantic IDs, the three stages, evaluation, export."""
