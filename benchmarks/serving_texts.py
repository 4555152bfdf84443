"""Texts for `bench_serving`: a system prompt, questions, and texts to repeat with small changes."""

from itertools import islice, product

# Some 600 tokens, of which `serving_prefix` takes 512.
SYSTEM = """\
You are the assistant of a public library in a small town by the sea. You answer questions of visitors, who
write to you from the library's web page or from the screen beside the entrance. Most of them want a short
answer, so begin with the answer itself, in one or two sentences, and add an explanation only where it
helps. Write plain English. Avoid long words where short ones will do, and never use more than one
exclamation mark.

The library is open from nine in the morning until six in the evening, from Monday to Friday, and from ten
until two on Saturdays. It is closed on Sundays and on public holidays. The reading room on the first floor
closes half an hour earlier than the rest of the house. Children under twelve may visit without a grown-up
until five in the afternoon. Dogs must wait outside, where there is a bowl of water for them beside the
bicycle stand.

A card is free for everyone who lives in the town or goes to school there. Others pay eight pounds a year.
With a card one may borrow up to fifteen items at a time: books for four weeks, films and games for one
week, and musical instruments for three months. Each loan can be renewed twice, unless somebody else has
asked for the item. Late items cost ten pence a day, and never more than the price of the item. Whoever
loses a book may bring another copy of it instead of paying.

When someone asks a question about the world, for example about geography, history or science, answer from
what you know. If you are not sure, say so, and name a book or a shelf where the answer may be found.
Geography is on the second floor, to the left of the stairs; history is opposite; science is in the room at
the end of the corridor. Novels are on the ground floor, in the order of their authors' names. Newspapers of
the last three months lie on the long table by the window, and older ones can be read on the two screens
next to it.

Do not give advice on medicine, law or money; tell the visitor kindly where such advice can be had. Do not
speak about other visitors, what they have borrowed, or when they were here. If someone is rude, stay polite
and offer to fetch a librarian. If someone seems to be in danger, tell them to call the emergency number at
once.

Every Wednesday at four there is a story hour for small children, every first Thursday of the month a book
club meets at seven, and on Saturday mornings two volunteers help with computers and telephones. No one
needs to sign up for any of these. The hall can be rented by clubs of the town; the form is at the front
desk.
"""

_COUNTRIES = (
    *("France", "Italy", "Spain", "Portugal", "Norway", "Sweden", "Finland", "Poland"),
    *("Greece", "Turkey", "Egypt", "Kenya", "India", "Japan", "Peru", "Chile"),
)
_ASKED = (
    "What is the capital of {}?",
    "Which language do most people speak in {}?",
    "Which sea or ocean does {} lie on?",
    "Name a famous dish from {}.",
)
QUESTIONS = [asked.format(country) for asked, country in product(_ASKED, _COUNTRIES)]

LIGHTHOUSE = """\
The lighthouse on the northern point was built in 1874, after three ships had been lost on the rocks in a
single winter. It is twenty-six metres high and made of granite, which was cut on the mainland, numbered
stone by stone, and brought across in flat boats whenever the sea allowed it. The first keeper was Thomas
Arden, a retired sailor, who lived in the small house beside the tower with his wife and four children.
Every evening he climbed the one hundred and thirty steps, filled the lamp with oil and wound the clockwork
that turned the lens. In fog he rang a bell by hand, once every thirty seconds, sometimes for two days and
nights together. The lamp was changed to electric light in 1931, and a motor took the place of the
clockwork. The last keeper left the island in 1988, when the light was made automatic. Since then the house
has stood empty, but the tower is painted every five years, and on clear nights the light can be seen from a
distance of nineteen miles. In summer a boat takes visitors to the island twice a week; the journey takes
forty minutes.
"""

BREAD = """\
To bake a simple loaf of bread you need five hundred grams of flour, three hundred and fifty grams of
lukewarm water, ten grams of salt and five grams of dry yeast. Mix the flour, the salt and the yeast in a
large bowl, add the water, and stir until no dry flour is left. Cover the bowl with a cloth and let the
dough rest for twenty minutes. Then knead it on a floured table for ten minutes, until it is smooth and
springs back when you press it with a finger. Put it back into the bowl, cover it again, and let it rise in
a warm place for an hour and a half, or until it has doubled in size. Shape the dough into a round loaf and
place it on a sheet of baking paper. Let it rise for another forty minutes. In the meantime heat the oven to
two hundred and thirty degrees, with an empty tin on the lowest shelf. Cut a cross into the top of the loaf
with a sharp knife, put it into the oven, pour a cup of water into the hot tin, and close the door quickly.
After fifteen minutes lower the heat to two hundred degrees, and bake the loaf for another twenty-five
minutes. It is done when it sounds hollow if you knock on its base.
"""

INVENTORY = '''\
class Inventory:
    """Counts of items by name."""

    def __init__(self):
        self.items = {}

    def add(self, name, count=1):
        if count < 1:
            raise ValueError("count must be at least 1")
        self.items[name] = self.items.get(name, 0) + count

    def remove(self, name, count=1):
        if self.items.get(name, 0) < count:
            raise ValueError("not enough items")
        self.items[name] = self.items[name] - count
        if self.items[name] == 0:
            del self.items[name]

    def count(self, name):
        return self.items.get(name, 0)

    def total(self):
        return sum(self.items.values())

    def report(self):
        lines = []
        for name in sorted(self.items):
            lines.append(f"{name}: {self.items[name]}")
        return "\\n".join(lines)
'''

READINGS = """\
def read_lines(path):
    with open(path) as file:
        return [line.strip() for line in file if line.strip()]


def parse_reading(line):
    station, date, value = line.split(",")
    return {"station": station, "date": date, "value": float(value)}


def load_readings(path):
    readings = []
    for line in read_lines(path):
        if not line.startswith("#"):
            readings.append(parse_reading(line))
    return readings


def mean_by_station(readings):
    totals = {}
    for reading in readings:
        total, count = totals.get(reading["station"], (0.0, 0))
        totals[reading["station"]] = (total + reading["value"], count + 1)
    return {station: total / count for station, (total, count) in totals.items()}


def warmest(readings):
    means = mean_by_station(readings)
    return max(means, key=means.get)
"""

# What to do with each text; the answer repeats most of it.
EDITS = (
    (
        LIGHTHOUSE,
        "Summarize the text. Keep its own words and sentences, and leave out only what matters least.",
    ),
    (INVENTORY, "Rewrite the code. Rename the class Inventory to Stock and change nothing else."),
    (BREAD, "Repeat the text word for word, but write one kilogram of flour instead of five hundred grams."),
    (READINGS, "Rewrite the code. Rename the function warmest to hottest and change nothing else."),
    (BREAD, "Summarize the text. Keep its own words and sentences, and leave out only what matters least."),
    (READINGS, "Rewrite the code. Rename the key value to degrees and change nothing else."),
    (LIGHTHOUSE, "Repeat the text word for word, but say that the lighthouse was built in 1901."),
    (INVENTORY, "Rewrite the code. Rename the method total to size and change nothing else."),
)


def edits(count: int) -> list[str]:
    """The first prompts of `EDITS`."""
    return [f"{task}\n\n{text}" for text, task in islice(EDITS, count)]
