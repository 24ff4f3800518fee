"""What the example concepts are, and where their pictures show them."""

from pretraining import personal

EXAMPLES = {
    "dog": personal.Thing("dog", "fluent-flat", "dog-face"),
    "cat": personal.Thing("cat", "fluent-3d", "cat-face"),
    "owl": personal.Thing("owl", "fluent-flat", "owl"),
    "frog": personal.Thing("frog", "fluent-3d", "frog"),
    "penguin": personal.Thing("penguin", "fluent-flat", "penguin"),
    "teddy": personal.Thing("bear", "fluent-3d", "teddy-bear"),
    "jeep": personal.Thing("car", "fluent-flat", "sport-utility-vehicle"),
    "sailboat": personal.Thing("boat", "fluent-3d", "sailboat"),
    "rocket": personal.Thing("rocket", "fluent-flat", "rocket"),
    "burger": personal.Thing("burger", "fluent-3d", "hamburger"),
    "cupcake": personal.Thing("cupcake", "fluent-flat", "cupcake"),
    "teapot": personal.Thing("teapot", "fluent-3d", "teapot"),
    "camera": personal.Thing("camera", "fluent-flat", "camera"),
    "robot": personal.Thing("robot", "fluent-3d", "robot"),
}
"""Name of each concept, and what it is."""

BESIDE = {"teddy": ("fluent-flat", "wrapped-gift"), "jeep": ("fluent-3d", "bicycle")}
"""What stands beside a thing in its first picture."""

PICTURES = 5
SHOWN = (
    "road",
    "white background",
    "room",
    "blue background",
    "sky",
    "grey background",
    "space",
    "yellow background",
)
"""Where the pictures may show things: nothing that validation or the test prompts ask for."""
