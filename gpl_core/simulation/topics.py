"""The topic tree that item texts are made from: departments -> topics -> products, in real English words.

Real words matter: a frozen sentence encoder then sees the tree's structure the way it would on a real shop. The tree
is data only; what an item is truly like, and what a user truly wants, is drawn in `item_world` and `users`.
"""

import re
from dataclasses import dataclass
from functools import cache

# department: adjectives; materials; uses; brands
_DEPARTMENTS = """
Outdoor: lightweight, waterproof, rugged, compact, insulated; nylon, aluminium, canvas, titanium;
  weekend hikes, cold mornings, long trails, family camping; Northpeak, Trailborn, Ridgeway
Kitchen: non-stick, stainless, heavy-duty, stackable, dishwasher-safe; steel, ceramic, bamboo, silicone;
  busy cooks, small kitchens, Sunday dinners, first homes; Hearthline, Copperleaf, Mesa
Audio: wireless, noise-cancelling, portable, studio, vintage; plastic, walnut, leather, mesh;
  commuters, musicians, late evenings, podcasts; Sonara, Wavecrest, Bluenote
Garden: hardy, slow-growing, weatherproof, ergonomic, organic; cedar, terracotta, galvanised steel, rubber;
  raised beds, balconies, spring planting, shady corners; Greenacre, Fernhill, Mossway
Office: adjustable, quiet, slim, refillable, modular; oak, mesh, recycled paper, metal;
  home offices, students, long meetings, tidy desks; Deskwise, Paperlane, Clerk
Fitness: adjustable, sweat-proof, foldable, weighted, breathable; neoprene, cast iron, cork, foam;
  beginners, morning workouts, marathon training, recovery; Pulse, Ironbird, Stride
Toys: wooden, educational, magnetic, colourful, interactive; beech wood, plush, cardboard, felt;
  toddlers, rainy days, birthdays, curious children; Tinkerbox, Jollybean, Pipkin
Workshop: cordless, precision, industrial, adjustable, impact-rated; carbide, chrome vanadium, brass, hardened steel;
  electricians, furniture makers, home repairs, machine shops; Forgeman, Boltworks, Tradeline
Beauty: hydrating, fragrance-free, gentle, long-lasting, vegan; shea butter, aloe, clay, rose oil;
  sensitive skin, dry winters, travel bags, daily care; Lumiere, Petal, Purewell
Pets: chew-proof, washable, reflective, orthopaedic, grain-free; fleece, rope, salmon, natural rubber;
  puppies, indoor cats, senior dogs, anxious pets; Pawsome, Whisker, Fetchwell
Photography: compact, weather-sealed, wide-angle, fast, collapsible; carbon fibre, glass, magnesium, nylon;
  portraits, night skies, travel vlogs, wildlife; Obscura, Fieldlens, Aperta
Fashion: slim-fit, reversible, hand-stitched, quilted, casual; merino wool, denim, linen, suede;
  autumn walks, office days, formal evenings, summer holidays; Marlowe, Threadbare, Elmstreet
"""

# department / topic = products
_TOPICS = """
Outdoor / tents = dome tent, tunnel tent, tarp shelter, bivouac sack, beach shelter
Outdoor / sleeping gear = sleeping bag, sleeping pad, camping hammock, inflatable pillow, bag liner
Outdoor / camp cooking = gas stove, titanium pot, camping kettle, mess kit, fire starter
Outdoor / hiking = trekking poles, daypack, hiking boots, gaiters, trail map case
Outdoor / climbing = climbing harness, belay device, chalk bag, carabiner set, climbing rope
Kitchen / cookware = frying pan, saucepan, dutch oven, wok, casserole dish
Kitchen / knives = chef knife, paring knife, bread knife, knife sharpener, knife block
Kitchen / baking = cake tin, rolling pin, mixing bowl, cookie cutter, proofing basket
Kitchen / coffee = espresso machine, coffee grinder, french press, pour-over dripper, milk frother
Kitchen / storage = spice rack, lunch box, glass jar, vacuum container, bread bin
Audio / headphones = over-ear headphones, in-ear monitors, headphone stand, ear cushions, headphone cable
Audio / speakers = bookshelf speaker, soundbar, subwoofer, bluetooth speaker, speaker stand
Audio / recording = condenser microphone, audio interface, pop filter, shock mount, field recorder
Audio / vinyl = turntable, phono cartridge, record brush, vinyl crate, phono preamp
Audio / instruments = acoustic guitar, ukulele, digital piano, drum pad, guitar tuner
Garden / planting = seed tray, flower pot, potting bench, plant labels, bulb planter
Garden / pruning = pruning shears, hedge trimmer, loppers, pruning saw, garden gloves
Garden / watering = garden hose, watering can, drip irrigation kit, sprinkler, rain barrel
Garden / patio = garden bench, patio umbrella, fire pit, outdoor rug, string lights
Garden / wildlife = bird feeder, bee house, bird bath, hedgehog house, bat box
Office / writing = fountain pen, gel pen, mechanical pencil, ink bottle, pencil case
Office / paper = dotted notebook, sketchbook, sticky notes, planner, printer paper
Office / seating = office chair, footrest, lumbar cushion, standing stool, chair mat
Office / desk = standing desk, monitor arm, desk lamp, cable tray, drawer unit
Office / filing = ring binder, document tray, label maker, paper shredder, archive box
Fitness / yoga = yoga mat, yoga block, yoga strap, meditation cushion, yoga towel
Fitness / weights = dumbbell set, kettlebell, barbell, weight bench, wrist wraps
Fitness / running = running shoes, running belt, running vest, headlamp, compression socks
Fitness / cycling = bike helmet, bike pump, cycling gloves, bike lock, saddle bag
Fitness / swimming = swim goggles, swim cap, kickboard, training fins, swim buoy
Toys / puzzles = jigsaw puzzle, brain teaser, puzzle mat, cube puzzle, tangram
Toys / building = building blocks, marble run, model kit, train set, construction crane
Toys / board games = strategy board game, card game, dice set, chess set, party game
Toys / dolls = rag doll, doll house, doll pram, puppet theatre, doll clothes
Toys / science = microscope kit, chemistry set, volcano kit, star projector, robot kit
Workshop / power tools = cordless drill, circular saw, angle grinder, jigsaw, orbital sander
Workshop / hand tools = claw hammer, screwdriver set, adjustable wrench, chisel set, hand plane
Workshop / fasteners = wood screws, wall anchors, staples, hex bolts, blind rivets
Workshop / measuring = digital caliper, tape measure, laser level, micrometer, combination square
Workshop / safety = safety glasses, dust mask, ear defenders, work gloves, knee pads
Beauty / skincare = face cream, face serum, cleansing gel, sunscreen, eye cream
Beauty / haircare = shampoo bar, hair mask, hair dryer, detangling brush, hair oil
Beauty / makeup = lipstick, mascara, foundation, eyeshadow palette, makeup brush
Beauty / bath = bath bombs, body scrub, hand soap, bath towel, shower oil
Beauty / nails = nail polish, nail file, cuticle oil, nail lamp, manicure set
Pets / dogs = dog bed, dog leash, dog harness, chew toy, dog bowl
Pets / cats = cat tree, litter box, scratching post, cat tunnel, catnip mouse
Pets / aquarium = aquarium filter, fish tank, aquarium plants, fish food, tank heater
Pets / grooming = pet brush, nail clippers for pets, pet shampoo, grooming table, lint roller
Pets / training = clicker, training treats, puppy pads, agility tunnel, dog whistle
Photography / cameras = mirrorless camera, film camera, action camera, instant camera, camera body cap
Photography / lenses = prime lens, zoom lens, macro lens, lens filter, lens cleaning kit
Photography / support = tripod, gimbal stabiliser, monopod, camera strap, ball head
Photography / lighting = softbox, ring light, flash unit, light stand, reflector disc
Photography / bags = camera backpack, lens pouch, hard case, rain cover, memory card wallet
Fashion / jackets = rain jacket, down jacket, bomber jacket, parka, waistcoat
Fashion / shoes = leather boots, canvas sneakers, loafers, sandals, shoe care kit
Fashion / knitwear = cardigan, roll-neck jumper, knitted scarf, beanie, wool gloves
Fashion / accessories = leather belt, silk tie, sunglasses, wristwatch, wallet
Fashion / bags = tote bag, messenger bag, weekender bag, clutch bag, laptop sleeve
"""


@dataclass(frozen=True)
class Topic:
    """One leaf of the tree. `name` is unique in its department; `products` are nouns."""

    department: int
    name: str
    products: tuple[str, ...]


@dataclass(frozen=True)
class Department:
    """One branch: the words its items' titles and descriptions draw from."""

    name: str
    adjectives: tuple[str, ...]
    materials: tuple[str, ...]
    uses: tuple[str, ...]
    brands: tuple[str, ...]


def _words(cell: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in cell.split(","))


@cache
def departments() -> tuple[Department, ...]:
    """The twelve departments, in a fixed order."""
    entries = (entry.split(":") for entry in re.split(r"\n(?=\w)", _DEPARTMENTS.strip()))
    return tuple(Department(name, *map(_words, words.split(";"))) for name, words in entries)


@cache
def topics() -> tuple[Topic, ...]:
    """The sixty topics (five per department), in a fixed order: department by department."""
    position = {department.name: index for index, department in enumerate(departments())}
    found = []
    for line in _TOPICS.strip().splitlines():
        path, products = line.split("=")
        department, name = path.split("/")
        found.append(Topic(position[department.strip()], name.strip(), _words(products)))
    return tuple(found)
