"""Built-in haystacks: the usual noise, and essay-like prose written for this project."""

from __future__ import annotations

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)

ESSAY = (
    "Most harbours were towns before they were harbours, and you can still see it in the way "
    "their streets refuse to run straight to the water.",
    "A carpenter who has moved house twice learns which of his tools he would miss, and the list "
    "is always shorter than he expected.",
    "When the observatory changed its clocks, the village below kept the old time for another "
    "eleven years out of plain habit.",
    "What we call a shortcut is often a long road that somebody else has already walked for us.",
    "The archive smelled of dust and lemon oil, and the woman at the desk asked for nothing but "
    "patience and clean hands.",
    "It is easier to forgive a bridge for being ugly than for being in the wrong place.",
    "Bread teaches arithmetic: double the flour, and you have doubled only the waiting.",
    "In the valley they plant walnuts for their grandchildren, and plums for themselves.",
    "Nobody remembers who proposed the second canal, but everyone remembers who paid for it.",
    "A good index is written by someone who has been lost in the book at least once.",
    "The orchestra tuned for so long that a child in the third row applauded, and was not wrong.",
    "Maps age in a particular way: the coastlines survive, the roads wander, the names die first.",
    "He kept a ledger of borrowed umbrellas, which was the only complete record the office had.",
    "Winter repairs are done twice, once with what is at hand and once with what was ordered.",
    "The theatre burned on a Monday, when it was dark anyway, and reopened half built.",
    "Every language has a word for the smell of rain, and most speakers have forgotten theirs.",
    "Arguments about tea begin with water and end, as a rule, with somebody's grandmother.",
    "She painted the boat the colour of the shed because there was paint left, and then the shed "
    "looked unfinished.",
    "The committee agreed on everything except the order in which it had agreed.",
    "A lighthouse is the only building whose whole purpose is to be avoided.",
    "They measured the field in afternoons, since nobody owned a chain long enough.",
    "Old radios warm up slowly, which gave the news a moment to compose itself.",
    "The second edition corrected eleven errors and added a dedication that contained the twelfth.",
    "Foxes cross the railway at the same place every night, a little after the last train.",
    "It took the town a generation to notice that the clock tower had no door.",
    "What survives of the recipe is a stain, a thumbprint and the words not too much.",
    "The ferry was late so regularly that the timetable was eventually adjusted to match it.",
    "You can tell a reader's mood by the margin: pencil when doubtful, ink when angry.",
    "Rain fell on the market for six days, and on the seventh people complained of the dust.",
    "Gardens are arguments with the weather in which both sides are sure of winning.",
)

TEXTS = {"noise": NOISE, "essay": ESSAY}
