"""English words for keys and word lists."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """amber ancient bitter brave brisk broad calm clever coastal copper crisp curious deep distant
    dusty eager early earnest faint famous fierce frosty gentle gilded glossy golden grave hidden
    hollow humble idle ivory jolly keen lively lonely lucid mellow mild modest narrow noble odd
    pale patient plain polite proud quiet rapid rare rustic scarlet secret shady silent silver
    sleepy slender solemn steady stern stout strange sturdy sunny swift tender thirsty tidy timid
    tranquil useful velvet violet vivid warm wary weary wild windy wise wooden young"""
)
NOUNS = _words(
    """acorn anchor anvil apple arrow attic badge bakery ballad banner barley barrel basket beacon
    beetle bell bench blanket bottle boulder bridge broom bucket button cabin candle canoe carpet
    castle cellar chapel cherry chimney cider cinema circle cliff cloak clock clover comet compass
    coral cotton cradle crate cricket crown curtain daisy dancer desert diary donkey drawer drum
    eagle echo ember engine falcon feather fence fiddle finger forest fountain fox garden garlic
    ginger glacier glove goblet grain granite grove guitar hammer harbor harvest hazel hedge helmet
    heron hill honey horizon hotel iceberg inkwell island ivy jacket jewel journal jungle kernel
    kettle kitchen kite ladder lagoon lantern lemon letter library lily lobster locket lumber
    magnet mango maple marble market meadow melon mill mirror mitten monsoon mosaic mountain museum
    napkin needle nest novel oak oasis ocean olive onion orbit orchard otter oven owl oyster paddle
    palace paper parrot pasture pebble pelican pencil pepper piano pigeon pillow pine planet plaza
    plum pocket poem pond poplar potter prairie puzzle quarry quilt rabbit raft ranch raven reed
    ribbon river robin rocket saddle sailor salmon satchel school shadow shawl shell shore shovel
    shutter sparrow spoon spring squirrel stable statue stone stove summit sunset swallow table
    tailor teapot temple theater thimble thistle thunder ticket tiger timber tower tractor trumpet
    tulip tunnel turnip turtle umbrella valley vase village vine violin wagon walnut water weaver
    whale wheat wheel whistle willow window winter wolf wool wren zebra"""
)
VERBS = _words(
    """admit argue arrive bake balance borrow bounce build carry carve chase climb collect compare
    cook copy count cross deliver deny describe dig divide draw dream earn empty enter escape
    explain explore fetch finish float fold follow forget gather glide greet grow guess hang hide
    hurry imagine invent invite join jump kneel knit laugh learn lend listen march measure mend
    mix move notice obey offer open order paint pause plant polish praise prefer print promise
    protect pull push reach read repair reply rescue return rinse roam scatter search send settle
    shake share shine sketch sleep slide smile sort speak stack steer stir stretch study sweep swim
    teach throw tie touch trade travel trim trust turn visit wait walk wander wash watch whisper
    wonder wrap write yawn"""
)
WORDS = NOUNS + ADJECTIVES + VERBS
