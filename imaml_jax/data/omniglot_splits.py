"""The 1,623 characters of Omniglot, and the published ways to split them."""

import numpy as np

DRAWERS = 20

# Alphabets of the two public archives with their numbers of characters.
BACKGROUND = {
    "Alphabet_of_the_Magi": 20,
    "Anglo-Saxon_Futhorc": 29,
    "Arcadian": 26,
    "Armenian": 41,
    "Asomtavruli_(Georgian)": 40,
    "Balinese": 24,
    "Bengali": 46,
    "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14,
    "Braille": 26,
    "Burmese_(Myanmar)": 34,
    "Cyrillic": 33,
    "Early_Aramaic": 22,
    "Futurama": 26,
    "Grantha": 43,
    "Greek": 24,
    "Gujarati": 48,
    "Hebrew": 22,
    "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16,
    "Japanese_(hiragana)": 52,
    "Japanese_(katakana)": 47,
    "Korean": 40,
    "Latin": 26,
    "Malay_(Jawi_-_Arabic)": 40,
    "Mkhedruli_(Georgian)": 41,
    "N_Ko": 33,
    "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14,
    "Sanskrit": 42,
    "Syriac_(Estrangelo)": 23,
    "Tagalog": 17,
    "Tifinagh": 55,
}
EVALUATION = {
    "Angelic": 20,
    "Atemayar_Qelisayer": 26,
    "Atlantean": 26,
    "Aurek-Besh": 26,
    "Avesta": 26,
    "Ge_ez": 26,
    "Glagolitic": 45,
    "Gurmukhi": 45,
    "Kannada": 41,
    "Keble": 26,
    "Malayalam": 47,
    "Manipuri": 40,
    "Mongolian": 30,
    "Old_Church_Slavonic_(Cyrillic)": 45,
    "Oriya": 46,
    "Sylheti": 28,
    "Syriac_(Serto)": 23,
    "Tengwar": 25,
    "Tibetan": 42,
    "ULOG": 26,
}
SPLITS = ("finn", "vinyals", "lake", "reptile", "mamlpp")

_VINYALS_VAL = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
# The test alphabets; of Gurmukhi only characters 42 to 45, the others train.
_VINYALS_TEST = tuple(list(EVALUATION)[list(EVALUATION).index("Kannada") :])
_SEED = 20190909


def class_names() -> tuple[str, ...]:
    """Returns `Alphabet/characterNN` for all 1,623 characters, in the order used everywhere here.

    The background archive first, then the evaluation archive, each sorted by name.
    """
    return tuple(
        f"{alphabet}/character{number:02d}"
        for alphabets in (BACKGROUND, EVALUATION)
        for alphabet, count in alphabets.items()
        for number in range(1, count + 1)
    )


def split_indices(split: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Returns the positions in `class_names()` of the training, validation and test characters.

    - "finn": 1100/100/423 random characters of all 1,623, as in MAML.
    - "reptile": 1200/423, no validation set.
    - "mamlpp": 1150/50/423, as in MAML++'s code.
    - "vinyals": 1028/172/423, by alphabet, as listed with Prototypical Networks.
    - "lake": the background set (964) to train, the evaluation set (659) to test.

    The random draws behind the results of MAML and Reptile were not published: those repositories
    shuffle a directory listing. "finn", "reptile" and "mamlpp" take theirs from one permutation,
    frozen by its seed (NumPy keeps the stream of `RandomState` fixed), so all have the same 423
    test characters, and the training and validation characters of one are those of the others.

    Args:
      split: one of "finn", "vinyals", "lake", "reptile", "mamlpp".

    Returns:
      Three sorted int arrays; the second is None where the protocol has no validation set.

    Raises:
      ValueError: `split` is unknown.

    References:
      Lake, Salakhutdinov, Tenenbaum, Science 350, 2015, https://github.com/brendenlake/omniglot
      Vinyals et al., https://arxiv.org/abs/1606.04080
      Finn, Abbeel, Levine, https://arxiv.org/abs/1703.03400
      Nichol, Achiam, Schulman, https://arxiv.org/abs/1803.02999
      Antoniou, Edwards, Storkey, https://arxiv.org/abs/1810.09502
    """
    names = class_names()
    if split in ("finn", "reptile", "mamlpp"):
        order = np.random.RandomState(_SEED).permutation(len(names))
        train = {"finn": 1100, "reptile": 1200, "mamlpp": 1150}[split]
        val = None if split == "reptile" else np.sort(order[train:1200])
        return np.sort(order[:train]), val, np.sort(order[1200:])
    if split == "lake":
        boundary = sum(BACKGROUND.values())
        return np.arange(boundary), None, np.arange(boundary, len(names))
    if split == "vinyals":
        alphabets = np.array([name.split("/")[0] for name in names])
        late_gurmukhi = [f"Gurmukhi/character{number}" for number in (42, 43, 44, 45)]
        val = np.isin(alphabets, _VINYALS_VAL)
        test = np.isin(alphabets, _VINYALS_TEST) | np.isin(names, late_gurmukhi)
        return np.flatnonzero(~val & ~test), np.flatnonzero(val), np.flatnonzero(test)
    raise ValueError(f"split={split!r}; allowed: {', '.join(map(repr, SPLITS))}.")
