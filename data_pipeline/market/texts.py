"""Names and texts of the market's items. They say what an item is about the way real ads do: category, brand, and words that go with
its latent vector, so that content embeddings carry signal."""

import numpy as np
import pyarrow as pa

_CATEGORIES = (
    "running shoes", "skin care", "headphones", "baby strollers", "coffee machines", "mountain bikes", "garden furniture", "board games",
    "hotel stays", "city flights", "online courses", "car insurance", "savings accounts", "dog food", "yoga mats", "fishing gear",
    "smart watches", "laptops", "phone cases", "kitchen knives", "red wine", "organic tea", "winter jackets", "wedding rings",
    "language lessons", "home security", "solar panels", "electric scooters", "mobile games", "streaming plans", "fitness clubs",
    "meal kits", "vitamins", "eyeglasses", "sofas", "mattresses", "lamps", "wall paint", "power tools", "used cars", "truck tires",
    "concert tickets", "art prints", "photo cameras", "printers", "cloud storage", "tax advice", "legal help", "moving services",
    "plants", "toys", "school bags", "perfume", "hair dryers", "makeup", "sneakers", "football kits", "ski trips", "camping tents",
    "hiking boots", "novels", "comics", "vinyl records", "guitars",
)
_STYLES = (
    "light", "heavy", "warm", "cool", "bold", "plain", "modern", "classic", "urban", "rural", "quiet", "lively", "premium", "budget",
    "soft", "tough", "bright", "dark", "natural", "technical", "compact", "roomy", "fast", "patient", "local", "global", "festive",
    "daily", "young", "mature", "sweet", "bitter", "handmade", "automatic", "sporty", "elegant", "rare", "popular", "mild", "intense",
)
_STARTS = (
    "al", "be", "co", "da", "el", "fi", "go", "ha", "in", "jo", "ka", "lu", "mi", "no", "or", "pa", "qui", "ra", "so", "tu", "ul", "vi",
    "wa", "xe", "yo", "za",
)
_ENDS = (
    "bra", "cor", "dex", "fan", "gro", "lia", "mar", "nex", "pol", "rix", "sta", "tor", "vex", "wen", "zon",
)


def category_names(num_topics: int) -> list[str]:
    """One name per topic."""
    return [_CATEGORIES[topic] if topic < len(_CATEGORIES) else f"{_CATEGORIES[topic % len(_CATEGORIES)]} {topic // len(_CATEGORIES) + 1}"
            for topic in range(num_topics)]


def brand_names(count: int) -> list[str]:
    """A different invented name each."""
    names = [start + end for end in _ENDS for start in _STARTS]
    return [names[number % len(names)] + ("" if number < len(names) else str(number // len(names))) for number in range(count)]


def item_texts(prefix: list[str], prefix_of_N: np.ndarray, topic_N: np.ndarray, num_topics: int, vector_ND: np.ndarray) -> pa.Array:
    """`<prefix> <category> <word> <word> <word>`: the words belong to the three strongest directions of the item's vector."""
    strongest = np.argsort(-np.abs(vector_ND), axis=1, kind="stable")[:, :3]
    positive = np.take_along_axis(vector_ND, strongest, axis=1) > 0
    words = pa.array([_STYLES[(2 * d + sign) % len(_STYLES)] for d in range(vector_ND.shape[1]) for sign in (0, 1)])
    columns = [pa.array(prefix).take(pa.array(prefix_of_N)), pa.array(category_names(num_topics)).take(pa.array(topic_N))]
    columns += [words.take(pa.array(2 * strongest[:, column] + positive[:, column])) for column in range(strongest.shape[1])]
    return pa.compute.binary_join_element_wise(*columns, " ")


def identifiers(prefix: str, count: int) -> pa.Array:
    """`<prefix>-0000042` for every number below `count`."""
    digits = pa.compute.utf8_lpad(pa.array(np.arange(count)).cast(pa.string()), 7, "0")
    return pa.compute.binary_join_element_wise(pa.scalar(prefix), digits, "-")
