"""The words of the made-up shop: departments, kits of products that follow each other, brands, finishes."""

from __future__ import annotations

# department -> kits (subcategory, its product nouns: the main product first, then what is bought after it, in order)
KITS: dict[str, list[tuple[str, tuple[str, str, str, str]]]] = {
    "Kitchen": [
        ("Espresso", ("Espresso Machine", "Burr Grinder", "Espresso Beans", "Descaler")),
        ("Bread Baking", ("Dutch Oven", "Proofing Basket", "Bread Flour", "Dough Scraper")),
        ("Tea", ("Electric Kettle", "Teapot", "Loose Leaf Tea", "Tea Infuser")),
        ("Knives", ("Chef's Knife", "Cutting Board", "Whetstone", "Knife Oil")),
    ],
    "Garden": [
        ("Lawn", ("Lawn Mower", "Grass Seed", "Lawn Fertilizer", "Edging Shears")),
        ("Vegetables", ("Raised Bed", "Potting Soil", "Tomato Seeds", "Plant Labels")),
        ("Grilling", ("Charcoal Grill", "Grill Tongs", "Charcoal Briquettes", "Grill Brush")),
        ("Birds", ("Bird Feeder", "Bird Seed Mix", "Bird Bath", "Nesting Box")),
    ],
    "Music": [
        ("Guitar", ("Electric Guitar", "Guitar Amplifier", "Guitar Cable", "Guitar Strings")),
        ("Drums", ("Drum Kit", "Drum Throne", "Drumsticks", "Practice Pad")),
        ("Home Recording", ("Audio Interface", "Condenser Microphone", "Pop Filter", "Studio Headphones")),
        ("Keyboard", ("Stage Piano", "Keyboard Stand", "Sustain Pedal", "Keyboard Cover")),
    ],
    "Cycling": [
        ("Road Cycling", ("Road Bike", "Clipless Pedals", "Cycling Shoes", "Chain Lube")),
        ("Commuting", ("City Bike", "Bike Lock", "Bike Lights", "Pannier Bag")),
        ("Mountain Biking", ("Mountain Bike", "Full Face Helmet", "Knee Pads", "Tubeless Sealant")),
        ("Bike Workshop", ("Repair Stand", "Hex Key Set", "Torque Wrench", "Bike Grease")),
    ],
    "Outdoor": [
        ("Camping", ("Tent", "Sleeping Bag", "Sleeping Mat", "Tent Pegs")),
        ("Trail Cooking", ("Camp Stove", "Gas Canister", "Titanium Pot", "Spork")),
        ("Climbing", ("Climbing Harness", "Climbing Rope", "Belay Device", "Chalk Bag")),
        ("Fishing", ("Fishing Rod", "Fishing Reel", "Fishing Line", "Lure Set")),
    ],
    "Photography": [
        ("Mirrorless", ("Mirrorless Camera", "Prime Lens", "Memory Card", "Lens Cloth")),
        ("Landscape", ("Tripod", "Wide Angle Lens", "Polarizing Filter", "Remote Release")),
        ("Instant Photos", ("Instant Camera", "Instant Film", "Photo Album", "Camera Strap")),
        ("Studio", ("Studio Flash", "Softbox", "Light Stand", "Backdrop Paper")),
    ],
    "Workshop": [
        ("Drilling", ("Cordless Drill", "Drill Bit Set", "Wall Plugs", "Spirit Level")),
        ("Painting", ("Paint Sprayer", "Wall Paint", "Masking Tape", "Drop Cloth")),
        ("Soldering", ("Soldering Station", "Solder Wire", "Helping Hands", "Desoldering Pump")),
        ("Woodworking", ("Table Saw", "Bar Clamps", "Wood Glue", "Sanding Discs")),
    ],
    "Pets": [
        ("Puppy", ("Dog Crate", "Dog Bed", "Puppy Food", "Chew Toy")),
        ("Cat", ("Litter Box", "Cat Litter", "Scratching Post", "Cat Treats")),
        ("Fishkeeping", ("Aquarium", "Aquarium Filter", "Water Conditioner", "Fish Food")),
        ("Dog Walks", ("Dog Harness", "Dog Leash", "Waste Bags", "Dog Raincoat")),
    ],
    "Fitness": [
        ("Home Gym", ("Weight Bench", "Dumbbell Set", "Gym Gloves", "Floor Mat")),
        ("Running", ("Running Shoes", "Running Socks", "Running Belt", "Energy Gels")),
        ("Yoga", ("Yoga Mat", "Yoga Block", "Yoga Strap", "Meditation Cushion")),
        ("Swimming", ("Swim Goggles", "Swim Cap", "Kickboard", "Microfiber Towel")),
    ],
    "Office": [
        ("Home Office", ("Standing Desk", "Office Chair", "Monitor Arm", "Cable Tray")),
        ("Printing", ("Laser Printer", "Toner Cartridge", "Printer Paper", "Paper Trimmer")),
        ("Fountain Pens", ("Fountain Pen", "Bottled Ink", "Dot Grid Notebook", "Pen Case")),
        ("Video Calls", ("Webcam", "Ring Light", "USB Headset", "Privacy Cover")),
    ],
    "Baby": [
        ("Nursery", ("Crib", "Crib Mattress", "Fitted Sheet", "Night Light")),
        ("Feeding", ("High Chair", "Silicone Bib", "Baby Spoons", "Snack Cups")),
        ("On the Go", ("Stroller", "Stroller Organizer", "Rain Cover", "Diaper Bag")),
        ("Bath Time", ("Baby Bathtub", "Hooded Towel", "Baby Shampoo", "Bath Toys")),
    ],
    "Games": [
        ("Console", ("Game Console", "Wireless Controller", "Charging Dock", "Carrying Case")),
        ("PC Gaming", ("Gaming Keyboard", "Gaming Mouse", "Mouse Pad", "Wrist Rest")),
        ("Board Games", ("Strategy Board Game", "Game Expansion", "Card Sleeves", "Dice Tray")),
        ("Model Trains", ("Train Set", "Track Extension", "Model Trees", "Model Glue")),
    ],
}

# department -> six brands: two of the low, two of the middle, two of the high price tier
BRANDS: dict[str, tuple[str, ...]] = {
    "Kitchen": ("Pottery Lane", "Quickcook", "Nordhavn", "Casa Lumo", "Brennhaus", "Maison Ferrand"),
    "Garden": ("Greenpatch", "Budding", "Oakfield", "Terravita", "Hortensia", "Wexley & Sons"),
    "Music": ("Jamstart", "Tonebox", "Riverstone", "Halcyon", "Castellan", "Amberline"),
    "Cycling": ("Pedalo", "Rollfix", "Velmora", "Kestrel Works", "Altavia", "Corsa Nera"),
    "Outdoor": ("Trailbud", "Campo", "Fjellvik", "Pinecrest", "Summit Eleven", "Arktika"),
    "Photography": ("Snapz", "Clearview", "Lumetta", "Optika Nord", "Hallstein", "Verano Pro"),
    "Workshop": ("Fixwell", "Handy Jo", "Torvald", "Ironbridge", "Meisterlin", "Granforge"),
    "Pets": ("Wagtail", "Pawsome", "Furrow", "Biscuit & Co", "Highland Hound", "Velvet Whisker"),
    "Fitness": ("Moveit", "Fitbasics", "Stridewell", "Corevia", "Olympa", "Titanhall"),
    "Office": ("Paperclip", "Deskmate", "Linnea", "Workwise", "Kontor", "Ashdown"),
    "Baby": ("Tiny Steps", "Cuddlebee", "Lillebror", "Mooncloud", "Petit Royal", "Sternchen"),
    "Games": ("Playbox", "Pixelpal", "Questwood", "Novabit", "Grandmaster", "Obsidian Arc"),
}

TIERS = ("everyday", "mid-range", "premium")
SERIES: tuple[tuple[str, ...], ...] = (
    ("Basic", "Easy", "Starter", "Lite", "Simple", "Go"),
    ("Classic", "Comfort", "Active", "Select", "Plus", "Home"),
    ("Pro", "Signature", "Master", "Reserve", "Elite", "Heritage"),
)
FINISHES = (
    "matte black", "white", "forest green", "sky blue", "red", "sand", "graphite", "copper", "lavender", "mustard",
)  # fmt: skip
