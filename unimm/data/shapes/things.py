"""Things that the shapes data set does not hold, and the honest answers to requests for them."""

from unimm.data.shapes.world import SHAPES
from unimm.english import enumeration, plural

THINGS = (
    *(
        "dog",
        "cat",
        "house",
        "tree",
        "car",
        "person",
        "face",
        "flower",
        "bird",
        "fish",
        "bus",
        "table",
        "chair",
        "boat",
    ),
    *("mountain", "cloud", "apple", "banana", "pizza", "robot", "king", "castle", "phone", "book", "bottle", "river"),
    *("train", "cow", "lion", "guitar", "hat", "shoe", "spoon", "lamp", "hexagon", "star", "heart", "arrow"),
)
UNSEEN_THINGS = ("horse", "plane", "bicycle", "elephant", "sandwich", "clock", "violin", "bridge", "snake", "pentagon")
"""Things that never occur in training."""
REFUSAL = f"I cannot draw that. I draw {enumeration([plural(shape) for shape in SHAPES])}."
"""Answer to a request to draw one of them."""
NONE_THERE = "There is none."
"""Answer to a question about something that is not in the image."""
