"""Names of the classes of the embedded teachers."""

from __future__ import annotations

_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm"""
_NAMES = {"digits": "0 1 2 3 4 5 6 7 8 9", "resnet20-cifar10": _CIFAR10, "resnet20-cifar100": _CIFAR100}


def labels_of(teacher: str, classes: int) -> list[str] | None:
    """Names of the classes in the order of the logits, or None if they are not known.

    Example:
        >>> labels_of("resnet20-cifar10", 10)[:2], len(labels_of("resnet20-cifar100", 100))
        (['airplane', 'automobile'], 100)
    """
    names = _NAMES.get(teacher, "").split()
    return names if len(names) == classes else None
