"""The topic tree that item texts are made from: departments -> topics -> products, in real English words.

Words carry their ordinary meaning, as far as it decides what goes with what: topics that share a theme are alike in
truth too, across departments, and so are products of one noun and items of one adjective or material. A sentence
encoder or language model that knows English knows more of this than the words in common show. The tree is data only;
what an item is truly like, and what a user truly wants, is drawn in `item_world` and `users`.
"""

import re
from dataclasses import dataclass
from functools import cache

# department: adjectives; materials; uses; brands
_DEPARTMENTS = """
Outdoor: lightweight, waterproof, rugged, compact, insulated; nylon, aluminum, canvas, titanium;
  weekend hikes, cold mornings, long trails, family camping; Northpeak, Trailborn, Ridgeway
Kitchen: non-stick, stainless, heavy-duty, stackable, dishwasher-safe; steel, ceramic, bamboo, silicone;
  busy cooks, small kitchens, Sunday dinners, first homes; Hearthline, Copperleaf, Mesa
Audio: wireless, noise-cancelling, portable, studio, vintage; plastic, walnut, leather, mesh;
  commuters, musicians, late evenings, podcasts; Sonara, Wavecrest, Bluenote
Garden: hardy, slow-growing, weatherproof, ergonomic, organic; cedar, terracotta, galvanized steel, rubber;
  raised beds, balconies, spring planting, shady corners; Greenacre, Fernhill, Mossway
Office: adjustable, quiet, slim, refillable, modular; oak, mesh, recycled paper, metal;
  home offices, students, long meetings, tidy desks; Deskwise, Paperlane, Clerk
Fitness: adjustable, sweat-proof, foldable, weighted, breathable; neoprene, cast iron, cork, foam;
  beginners, morning workouts, marathon training, recovery; Pulse, Ironbird, Stride
Toys: wooden, educational, magnetic, colorful, interactive; beech wood, plush, cardboard, felt;
  toddlers, rainy days, birthdays, curious children; Tinkerbox, Jollybean, Pipkin
Workshop: cordless, precision, industrial, adjustable, impact-rated; carbide, chrome vanadium, brass, hardened steel;
  electricians, furniture makers, home repairs, machine shops; Forgeman, Boltworks, Tradeline
Beauty: hydrating, fragrance-free, gentle, long-lasting, vegan; shea butter, aloe, clay, rose oil;
  sensitive skin, dry winters, travel bags, daily care; Lumiere, Petal, Purewell
Pets: chew-proof, washable, reflective, orthopedic, grain-free; fleece, rope, salmon, natural rubber;
  puppies, indoor cats, senior dogs, anxious pets; Pawsome, Whisker, Fetchwell
Photography: compact, weather-sealed, wide-angle, fast, collapsible; carbon fiber, glass, magnesium, nylon;
  portraits, night skies, travel vlogs, wildlife; Obscura, Fieldlens, Aperta
Fashion: slim-fit, reversible, hand-stitched, quilted, casual; merino wool, denim, linen, suede;
  autumn walks, office days, formal evenings, summer holidays; Marlowe, Threadbare, Elmstreet
"""

# department / topic (themes) = products
_TOPICS = """
Outdoor / tents (camping, shelter) = dome tent, tunnel tent, tarp shelter, bivouac sack, beach shelter
Outdoor / sleeping gear (camping, comfort) = sleeping bag, sleeping pad, camping hammock, inflatable pillow, bag liner
Outdoor / camp cooking (camping, cooking) = gas stove, titanium pot, camping kettle, mess kit, fire starter
Outdoor / hiking (walking, travel) = trekking poles, daypack, hiking boots, gaiters, trail map case
Outdoor / climbing (sport, safety) = climbing harness, belay device, chalk bag, carabiner set, climbing rope
Kitchen / cookware (cooking, family) = frying pan, saucepan, dutch oven, wok, casserole dish
Kitchen / knives (cooking, blades) = chef knife, paring knife, bread knife, knife sharpener, knife block
Kitchen / baking (cooking, making) = cake tin, rolling pin, mixing bowl, cookie cutter, proofing basket
Kitchen / coffee (cooking, morning) = espresso machine, coffee grinder, french press, pour-over dripper, milk frother
Kitchen / storage (storage, family) = spice rack, lunch box, glass jar, vacuum container, bread bin
Audio / headphones (music, travel) = over-ear headphones, in-ear monitors, headphone stand, ear pads, headphone cable
Audio / speakers (music, home) = bookshelf speaker, soundbar, subwoofer, bluetooth speaker, speaker stand
Audio / recording (music, film) = condenser microphone, audio interface, pop filter, shock mount, field recorder
Audio / vinyl (music, collecting) = turntable, phono cartridge, record brush, vinyl crate, phono preamp
Audio / instruments (music, making) = acoustic guitar, ukulele, digital piano, drum pad, guitar tuner
Garden / planting (plants, making) = seed tray, flower pot, potting bench, plant labels, bulb planter
Garden / pruning (plants, blades) = pruning shears, hedge trimmer, loppers, pruning saw, garden gloves
Garden / watering (plants, water) = garden hose, watering can, drip irrigation kit, sprinkler, rain barrel
Garden / patio (home, light) = garden bench, patio umbrella, fire pit, outdoor rug, string lights
Garden / wildlife (animals, plants) = bird feeder, bee house, bird bath, hedgehog house, bat box
Office / writing (study, art) = fountain pen, gel pen, mechanical pencil, ink bottle, pencil case
Office / paper (study, art) = dotted notebook, sketchbook, sticky notes, planner, printer paper
Office / seating (comfort, work) = office chair, footrest, lumbar cushion, standing stool, chair mat
Office / desk (work, light) = standing desk, monitor arm, desk lamp, cable tray, drawer unit
Office / filing (work, storage) = ring binder, document tray, label maker, paper shredder, archive box
Fitness / yoga (sport, calm) = yoga mat, yoga block, yoga strap, meditation cushion, yoga towel
Fitness / weights (sport, morning) = dumbbell set, kettlebell, barbell, weight bench, wrist wraps
Fitness / running (sport, walking) = running shoes, running belt, running vest, headlamp, compression socks
Fitness / cycling (sport, travel) = bike helmet, bike pump, cycling gloves, bike lock, saddle bag
Fitness / swimming (sport, water) = swim goggles, swim cap, kickboard, training fins, swim buoy
Toys / puzzles (children, calm) = jigsaw puzzle, brain teaser, puzzle mat, cube puzzle, tangram
Toys / building (children, making) = building blocks, marble run, model kit, train set, construction crane
Toys / board games (children, family) = strategy board game, card game, dice set, chess set, party game
Toys / dolls (children, clothing) = rag doll, doll house, doll pram, puppet theater, doll clothes
Toys / science (children, study) = microscope kit, chemistry set, volcano kit, star projector, robot kit
Workshop / power tools (making, work) = cordless drill, circular saw, angle grinder, jigsaw, orbital sander
Workshop / hand tools (making, repair) = claw hammer, screwdriver set, adjustable wrench, chisel set, hand plane
Workshop / fasteners (repair, home) = wood screws, wall anchors, staples, hex bolts, blind rivets
Workshop / measuring (repair, work) = digital caliper, tape measure, laser level, micrometer, combination square
Workshop / safety (safety, work) = safety glasses, dust mask, ear defenders, work gloves, knee pads
Beauty / skincare (care, morning) = face cream, face serum, cleansing gel, sunscreen, eye cream
Beauty / haircare (care, water) = shampoo bar, hair mask, hair dryer, detangling brush, hair oil
Beauty / makeup (care, art) = lipstick, mascara, foundation, eyeshadow palette, makeup brush
Beauty / bath (care, calm) = bath bombs, body scrub, hand soap, bath towel, shower oil
Beauty / nails (care, art) = nail polish, nail file, cuticle oil, nail lamp, manicure set
Pets / dogs (animals, walking) = dog bed, dog leash, dog harness, chew toy, dog bowl
Pets / cats (animals, home) = cat tree, litter box, scratching post, cat tunnel, catnip mouse
Pets / aquarium (animals, water) = aquarium filter, fish tank, aquarium plants, fish food, tank heater
Pets / grooming (animals, care) = pet brush, nail clippers for pets, pet shampoo, grooming table, lint roller
Pets / training (animals, study) = clicker, training treats, puppy pads, agility tunnel, dog whistle
Photography / cameras (film, travel) = mirrorless camera, film camera, action camera, instant camera, camera body cap
Photography / lenses (film, collecting) = prime lens, zoom lens, macro lens, lens filter, lens cleaning kit
Photography / support (film, travel) = tripod, gimbal stabilizer, monopod, camera strap, ball head
Photography / lighting (film, light) = softbox, ring light, flash unit, light stand, reflector disc
Photography / bags (storage, travel) = camera backpack, lens pouch, hard case, rain cover, memory card wallet
Fashion / jackets (clothing, shelter) = rain jacket, down jacket, bomber jacket, parka, waistcoat
Fashion / shoes (clothing, walking) = leather boots, canvas sneakers, loafers, sandals, shoe care kit
Fashion / knitwear (clothing, comfort) = cardigan, turtleneck sweater, knitted scarf, beanie, wool gloves
Fashion / accessories (clothing, collecting) = leather belt, silk tie, sunglasses, wristwatch, wallet
Fashion / bags (storage, travel) = tote bag, messenger bag, weekender bag, clutch bag, laptop sleeve
"""


@dataclass(frozen=True)
class Topic:
    """One leaf of the tree. `name` is unique in its department; `products` are nouns; a theme has several topics."""

    department: int
    name: str
    themes: tuple[str, ...]
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
    for department, name, themes, products in re.findall(r"^(.+) / (.+) \((.+)\) = (.+)$", _TOPICS, re.MULTILINE):
        found.append(Topic(position[department], name, _words(themes), _words(products)))
    return tuple(found)
