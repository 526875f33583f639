"""The vocabulary of the made-up world: objects, what they look like, where they are found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Concept:
    """A kind of object.

    Attributes:
        words: what captions call it, the label's name first; plurals in `plurals`.
        family: concepts of a family look alike, share attributes, and are mistaken for each other.
        height: usual height as a share of the image's; width = height * aspect.
        place: where it is found; see `scenes._place`.
    """

    words: tuple[str, ...]
    plurals: tuple[str, ...]
    family: str
    height: float
    aspect: float
    place: str

    @property
    def name(self) -> str:
        return self.words[0]


# words | plurals; family; height, aspect; place. A dot is a blank inside a name.
_TABLE = """
man guy gentleman | men guys gentlemen; adult; .56 .42; ground
woman lady | women ladies; adult; .54 .42; ground
boy kid | boys kids; child; .42 .45; ground
girl | girls; child; .42 .45; ground
baby infant toddler | babies infants toddlers; child; .26 .8; ground
dog puppy | dogs puppies; animal; .26 1.2; ground
cat kitten | cats kittens; animal; .2 1.2; ground
horse pony | horses ponies; animal; .42 1.2; ground
cow | cows; animal; .36 1.4; ground
sheep lamb | sheep lambs; animal; .24 1.3; ground
bird pigeon | birds pigeons; animal; .11 1.3; air
duck goose | ducks geese; animal; .14 1.3; ground
car sedan taxi | cars sedans taxis; vehicle; .26 1.8; ground
bus coach | buses coaches; vehicle; .42 1.5; ground
truck lorry | trucks lorries; vehicle; .4 1.5; ground
bicycle bike | bicycles bikes; vehicle; .3 1.3; ground
motorcycle motorbike | motorcycles motorbikes; vehicle; .3 1.4; ground
boat ship | boats ships; vehicle; .24 2.; ground
table counter | tables counters; furniture; .3 1.8; ground
chair stool | chairs stools; furniture; .34 .8; ground
sofa couch | sofas couches; furniture; .34 2.; ground
bed | beds; furniture; .34 2.; ground
desk | desks; furniture; .32 1.8; ground
shelf bookcase | shelves bookcases; furniture; .5 .7; ground
bench seat | benches seats; furniture; .22 2.2; ground
cabinet cupboard | cabinets cupboards; furniture; .4 .9; ground
pizza | pizzas; food; .1 1.7; surface
cake pastry | cakes pastries; food; .12 1.3; surface
apple fruit | apples fruits; food; .07 1.; surface
banana | bananas; food; .07 1.6; surface
sandwich burger | sandwiches burgers; food; .08 1.5; surface
salad vegetable | salads vegetables; food; .08 1.5; surface
cup mug | cups mugs; dish; .1 .9; surface
plate dish | plates dishes; dish; .06 2.2; surface
bowl | bowls; dish; .09 1.5; surface
bottle | bottles; dish; .17 .4; surface
glass | glasses; dish; .13 .6; surface
vase jar | vases jars; dish; .18 .6; surface
laptop computer notebook | laptops computers notebooks; device; .16 1.4; surface
keyboard | keyboards; device; .07 2.6; surface
phone cellphone | phones cellphones; device; .08 .7; hand
television tv screen | televisions tvs screens; device; .24 1.6; wall
lamp light | lamps lights; device; .24 .6; surface
clock | clocks; device; .13 1.; wall
camera | cameras; device; .09 1.2; hand
book magazine | books magazines; thing; .09 1.2; hand
umbrella parasol | umbrellas parasols; thing; .2 1.4; hand
backpack bag | backpacks bags; thing; .18 .8; hand
suitcase case | suitcases cases; thing; .2 .8; ground
hat cap | hats caps; thing; .08 1.4; head
helmet | helmets; thing; .09 1.2; head
ball | balls; toy; .08 1.; ground
frisbee disc | frisbees discs; toy; .06 1.7; air
kite | kites; toy; .15 1.1; air
skateboard board | skateboards boards; toy; .08 2.8; ground
surfboard | surfboards; toy; .34 .5; hand
teddy.bear bear | teddy.bears bears; toy; .18 .8; surface
guitar | guitars; toy; .2 1.2; hand
tree palm | trees palms; plant; .62 .7; ground
flower rose | flowers roses; plant; .14 .9; ground
bush hedge | bushes hedges; plant; .24 1.4; ground
plant pot | plants pots; plant; .26 .7; ground
rock boulder | rocks boulders; plant; .16 1.4; ground
building tower | buildings towers; structure; .66 .8; back
house cottage barn | houses cottages barns; structure; .5 1.2; back
bridge | bridges; structure; .3 2.4; back
fence railing | fences railings; structure; .2 3.; back
window | windows; structure; .3 .8; wall
door gate | doors gates; structure; .6 .5; back
sign signpost | signs signposts; structure; .16 .9; wall
traffic.light | traffic.lights; structure; .2 .4; wall
painting poster | paintings posters; structure; .2 1.1; wall
fountain statue | fountains statues; structure; .36 .8; ground
sky cloud | skies clouds; stuff; .4 0.; top
mountain hill | mountains hills; stuff; .3 0.; horizon
water sea lake | waters seas lakes; stuff; .35 0.; low
sand shore | sands shores; stuff; .35 0.; bottom
grass lawn | grasses lawns; stuff; .45 0.; bottom
road pavement | roads pavements; stuff; .35 0.; bottom
floor carpet | floors carpets; stuff; .35 0.; bottom
wall | walls; stuff; .6 0.; top
"""


def _read_table() -> tuple[Concept, ...]:
    concepts = []
    for line in _TABLE.strip().splitlines():
        words, family, shape, place = line.split(";")
        singular, plural = (
            tuple(word.replace(".", " ") for word in part.split()) for part in words.split("|")
        )
        height, aspect = (float(number) for number in shape.split())
        concepts.append(Concept(singular, plural, family.strip(), height, aspect, place.strip()))
    return tuple(concepts)


CONCEPTS = _read_table()
FAMILIES = tuple(dict.fromkeys(concept.family for concept in CONCEPTS))

# What may be in the foreground, likeliest first, and what surrounds it.
_SCENES: dict[str, tuple[str, str]] = {
    "street": (
        "man car woman bus bicycle dog sign traffic.light truck motorcycle umbrella girl "
        "backpack bench boy phone suitcase helmet bird clock skateboard hat camera fountain "
        "guitar",
        "building road sky tree house bridge fence door window bush",
    ),
    "park": (
        "dog man woman tree bench boy girl frisbee ball bicycle bird flower fountain kite "
        "duck backpack rock baby hat camera guitar book sandwich horse skateboard",
        "grass sky bush fence water building road mountain bridge",
    ),
    "living room": (
        "sofa cat television table lamp woman man chair dog book teddy.bear girl laptop plant "
        "clock painting vase baby cup guitar boy flower phone shelf bowl",
        "floor wall window door painting shelf plant cabinet",
    ),
    "kitchen": (
        "table woman bowl cup bottle man plate apple cabinet cake chair banana glass pizza "
        "salad phone girl cat sandwich vase boy clock plant baby flower",
        "floor wall window cabinet door shelf lamp",
    ),
    "beach": (
        "man surfboard woman umbrella boat dog girl boy kite bird ball rock chair hat horse "
        "baby backpack bicycle camera frisbee book house",
        "sand water sky mountain building fence house bush",
    ),
    "farm": (
        "horse cow sheep man fence house dog tree truck woman boy bird duck girl rock hat cat "
        "camera bicycle flower motorcycle apple",
        "grass sky mountain bush road water tree fence",
    ),
    "restaurant": (
        "table woman man pizza plate glass cake chair salad bottle cup sandwich bowl girl "
        "phone boy lamp flower vase hat baby book camera painting clock",
        "wall floor window door lamp painting plant",
    ),
    "office": (
        "desk laptop man woman chair keyboard phone lamp cup book clock plant backpack bottle "
        "shelf camera television cat glass vase apple painting",
        "wall floor window door cabinet shelf painting",
    ),
    "playground": (
        "boy girl ball bench man bicycle woman skateboard dog baby frisbee tree helmet "
        "backpack hat kite flower bird teddy.bear guitar sandwich phone",
        "grass fence sky building tree bush road house",
    ),
    "bedroom": (
        "bed cat lamp woman girl teddy.bear book dog baby laptop clock painting boy chair "
        "television plant suitcase man phone vase guitar flower",
        "wall floor window door cabinet shelf painting",
    ),
}
SCENES = {
    kind: tuple(tuple(name.replace(".", " ") for name in names.split()) for names in lists)
    for kind, lists in _SCENES.items()
}

_COLOURS = ("red", "blue", "white", "black", "green", "yellow", "brown", "gray", "orange", "pink")
_SIZES = ("big", "small")
_MATERIALS = ("wooden", "metal", "plastic")
# By family: the kinds of attribute, and the values of each.
ATTRIBUTES: dict[str, dict[str, tuple[str, ...]]] = {
    "adult": {
        "age": ("young", "old"),
        "colour": _COLOURS,
        "pose": ("standing", "sitting", "walking", "running", "jumping"),
    },
    "child": {"colour": _COLOURS, "pose": ("standing", "sitting", "running", "jumping", "lying")},
    "animal": {
        "size": _SIZES,
        "colour": ("white", "black", "brown", "gray"),
        "pose": ("standing", "sitting", "running", "lying"),
    },
    "vehicle": {"size": _SIZES, "colour": _COLOURS},
    "furniture": {"colour": ("white", "brown", "black", "red", "blue"), "material": _MATERIALS},
    "food": {"size": _SIZES},
    "dish": {"colour": _COLOURS, "material": _MATERIALS},
    "device": {"size": _SIZES, "colour": ("black", "white", "gray")},
    "thing": {"colour": _COLOURS, "pattern": ("striped", "spotted")},
    "toy": {"size": _SIZES, "colour": _COLOURS},
    "plant": {"size": _SIZES, "colour": ("green", "yellow", "red", "pink")},
    "structure": {
        "colour": ("white", "brown", "red", "gray", "yellow"),
        "material": ("wooden", "metal"),
    },
    "stuff": {},
}
VALUES = tuple(
    dict.fromkeys(
        value for kinds in ATTRIBUTES.values() for values in kinds.values() for value in values
    )
)

PEOPLE = ("adult", "child")
# What people sit on, what they ride, what small things stand on.
SEATS = ("bench", "chair", "sofa", "bed")
MOUNTS = ("horse", "bicycle", "motorcycle", "skateboard")
SURFACES = ("table", "desk", "bed", "shelf", "cabinet")
