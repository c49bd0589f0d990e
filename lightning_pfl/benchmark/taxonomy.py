"""What kind of thing a noun names, for sources whose files have names but no classes.

The lists are ours; they hold the nouns of the Art4Apps and GCompris pictures, already normalised (singular).
"""

from __future__ import annotations

from lightning_pfl.benchmark.images import normalise

_LISTS = """
animal/mammal: alpaca, anteater, antelope, baboon, baby rabbit, badger, bat, bear, beaver, bison, boar, buffalo,
    bull, calf, camel, caribou, cat, cheetah, chimp, chimpanzee, chipmunk, cougar, cow, deer, dingo, doe, dog,
    donkey, dromedary, elephant, elk, fawn, ferret, fox, gibbon, giraffe, gnu, goat, gopher, gorilla, guinea pig,
    hamster, hedgehog, hippopotamus, horse, hyena, jaguar, kangaroo, kitten, koala, lama, lamb, lemur, leopard,
    lion, lion cub, llama, lynx, macaque, mammoth, mandrill, marmot, meerkat, mole, monkey, moose, mouse, opossum,
    orangutan, otter, ox, panda, panther, pig, pika, polar bear, pony, pug, puppy, rabbit, raccoon, ram, rat, rhino,
    rhinoceros, sheep, skunk, sloth, squirrel, tiger, wapiti, wolf, wombat, yak, zebra, zebu
animal/bird: bird, blackbird, chick, chicken, crane, crow, cuckoo, dodo, dove, drake, duck, eagle, egret, flamingo,
    gander, goose, gosling, gull, harrier, hen, heron, hummingbird, jay, kingfisher, lark, lorikeet, magpie,
    northern harrier, ostrich, owl, parakeet, parrot, peacock, pelican, penguin, pigeon, quetzal, rhea, rooster,
    rosella, scarlet macaw, seagull, shrike, sparrow, spoonbill, stork, swan, toucan, turkey, vulture
animal/marine: abalone, blowfish, butterflyfish, clam, clownfish, crab, dolphin, dolphinfish, fish, jellyfish,
    lionfish, lobster, mussel, narwhal, octopus, orca, oyster, piranha, ray, seahorse, seal, shark, shrimp, squid,
    starfish, trout, whale, wrasse
animal/bug: ant, bee, beetle, bug, butterfly, caterpillar, cockroach, cricket, dragonfly, fly, grasshopper,
    honeybee, hornet, hoverfly, ladybug, mantis, mosquito, scorpion, slug, snail, spider, wasp, woodlouse, worm
animal/reptile: alligator, chamaeleon, chameleon, cobra, crocodile, dragon, frog, iguana, lizard, salamander, snake,
    toad, tortoise, turtle, viper
food/fruit: apple, apricot, banana, blackberry, blueberry, cherry, coconut, fig, grape, grapefruit, kiwi, kiwifruit,
    lemon, lime, mango, melon, orange, papaya, peach, pear, pineapple, plum, pomegranate, raspberry, strawberry
food/vegetable: artichoke, asparagus, aubergine, avocado, bean, broccoli, cabbage, carrot, cauliflower, celery,
    corn, cucumber, eggplant, garlic, leek, lettuce, onion, pea, pepper, potato, pumpkin, radish, spinach, squash,
    tomato, turnip, yam
food/sweet: cake, candy, chocolate, cookie, dessert, doughnut, fudge, gum, hot chocolate, ice cream, jam, jelly,
    pie, sprinkle, sugar
food/drink: coffee, juice, lemonade, milk, tea, water bottle
food/meal: bacon, beef, bread, bun, cheese, egg, feast, fry, ham, hamburger, hot dog, lunch, mashed potato, meal,
    meat, pizza, pretzel, rice, roast, sandwich, sausage, soup, spaghetti, steak, stew
vehicle/road: bicycle, bike, bus, car, motorcycle, taxi, train, truck, van
vehicle/water: boat, canoe, raft, ship
vehicle/air: airplane, helicopter, rocket
"""


def _parsed(text: str) -> dict[str, str]:
    """Read "category: noun, noun" entries, continued on indented lines, into noun -> category."""
    entries = text.strip().replace("\n    ", " ").splitlines()
    pairs = (entry.split(": ") for entry in entries)
    return {noun: category for category, nouns in pairs for noun in nouns.split(", ")}


_CATEGORY = _parsed(_LISTS)


def category_of(concept: str) -> str | None:
    """Category of a normalised noun, such as "animal/bird"; None for a noun that is not listed.

    Example:
        >>> category_of("owl"), category_of("guinea pig"), category_of("mortgage")
        ('animal/bird', 'animal/mammal', None)
    """
    return _CATEGORY.get(concept)


# Names under which one drawing, or nearly one, appears twice (16 x 16 mean hash within 12 bits, looked at by eye).
_SAME = {
    "japanese post office": "post office",
    "european post office": "post office",
    "empty nest": "nest",
    "nest with egg": "nest",
    "bike": "bicycle",
    "ninja": "baby",
    "stefan": "scart",
}


def concept_of(name: str) -> str:
    """Split key of a name: normalised, and only its last word where that is a listed noun.

    So a brown hen and a hen, a police car and a car lie on one side of a split; so do names of nearly the same drawing.

    Example:
        >>> concept_of("Brown Hen"), concept_of("POLICE CAR"), concept_of("birthday cake"), concept_of("Flag of Peru")
        ('hen', 'car', 'cake', 'flag of peru')
    """
    concept = normalise(name)
    concept = _SAME.get(concept, concept)
    last = concept.split(" ")[-1]
    return last if last in _CATEGORY else concept
