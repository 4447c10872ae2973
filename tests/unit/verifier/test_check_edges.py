"""Where each step of the check begins and where it ends, to the character and to the second.

`test_check` throws what is known to have fooled others; here every limit is met from both sides,
with the numbers of the contract instead of ours, so that a check that moves by one is noticed.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from coatcheck.restrictions import Situation
from coatcheck.token_profile import ALGORITHMS
from coatcheck.verifier import UnknownSigningKey, VerifierError, check, keyset
from support.tokens import (
    ABSENT,
    AUDIENCE,
    ISSUER,
    NOW,
    Signer,
    as_json,
    base64url,
    claims,
    key_set,
    signer,
)

EXPECTED = check.Expected(
    issuer=ISSUER,
    audiences=(AUDIENCE, "urn:second-name"),
    types=frozenset({"at+jwt"}),
    algorithms=frozenset(ALGORITHMS),
    leeway_s=30,
)
#: The last second of the year 9999.
LAST_SECOND = 253_402_300_799


def signed(token: str, by: Signer | None = None) -> check.SignedClaims:
    by = by or signer()
    return check.check_signed(token, EXPECTED, keyset.parse(key_set(by.jwk())).get)


def accept(token: str, by: Signer | None = None, *, now: float = NOW) -> Mapping[str, Any]:
    accepted = signed(token, by)
    check.check_use(accepted, EXPECTED, now, Situation())
    return accepted.claims


def refusal(token: str, by: Signer | None = None, *, now: float = NOW) -> VerifierError:
    with pytest.raises(VerifierError) as refused:
        accept(token, by, now=now)
    return refused.value


# Form


def test_a_token_has_at_most_4096_characters() -> None:
    """Contract: 4 KiB.  Proxies cut headers off not far above, and every step costs per byte."""
    by_length = {
        len(text): text
        for number in range(2640, 2700)
        # Base64 has gaps, and another length of the header fills them.
        for x in ("", "x", "xx")
        for text in [signer().token(claims(x="x" * number), x=x)]
    }

    assert accept(by_length[4096])
    assert refusal(by_length[4097]).code == "token_malformed"


@pytest.mark.parametrize(
    "form", ["", "{0}", "{0}.{1}", "{0}.{1}.{2}.", "{0}.{1}.{2}.{2}", ".{0}.{1}.{2}"]
)
def test_a_token_has_three_parts(form: str) -> None:
    """RFC 7515 §3.1.  Told by its form: no signature was looked at, so none is called bad."""
    header, payload, signature = signer().token(claims()).split(".")

    assert refusal(form.format(header, payload, signature)).code == "token_malformed"


def test_a_fourth_part_is_told_before_anything_that_the_header_says() -> None:
    """Steps 1 and 2 in their order: whoever sends no JWS is told so, and not about an algorithm."""
    unfit = signer().token(claims(), alg=1)
    header, payload, signature = unfit.split(".")

    assert refusal(unfit).code == "bad_algorithm"
    assert refusal(f"{header}.{payload}.{payload}.{signature}").code == "token_malformed"


FOREIGN = {
    "standard alphabet": "+/+/",
    "padding": "====",
    "exclamation marks": "!!!!",
    "blanks": "    ",
    "line breaks": "\r\n\r\n",
    "NUL": "\0\0\0\0",
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("part", [0, 1, 2], ids=["header", "payload", "signature"])
def test_no_foreign_character_is_passed_over(part: int, foreign: str) -> None:
    """
    A lenient decoder skips them: one token would have any number of texts.

    Four of them keep the length and the last character as they were.  RFC 4648 §3.3.
    """
    pieces = signer().token(claims()).split(".")
    pieces[part] = pieces[part][:8] + foreign + pieces[part][8:]

    assert refusal(".".join(pieces)).code == "token_malformed"


# Header


def header_of(length: int) -> str:
    """A header whose text in the token has this length."""
    room = length * 3 // 4 - len(as_json(signer().header(x="")))
    text = base64url(as_json(signer().header(x="x" * room)))
    assert len(text) == length
    return text


def test_a_header_has_at_most_1024_characters() -> None:
    """Ours have 128; whoever sends more wants us to parse, or to remember what was parsed."""
    header = header_of(1024)
    _, payload, _ = signer().token(claims()).split(".")
    signature = base64url(signer().signature(f"{header}.{payload}".encode()))

    assert accept(f"{header}.{payload}.{signature}")
    assert refusal(f"{header_of(1026)}.{payload}.{signature}").code == "token_malformed"


@pytest.mark.parametrize("length", [1, 256])
def test_a_kid_has_one_to_256_characters(length: int) -> None:
    """It is opaque; the limit is on both sides, of the key set and of the token."""
    by = signer(kid="k" * length)

    assert accept(by.token(claims()), by)


def test_an_algorithm_that_is_not_wanted_here_is_refused_whatever_the_key_set_holds() -> None:
    """Step 3, before any signing key is looked for.  RFC 8725 §3.1."""
    narrow = dataclasses.replace(EXPECTED, algorithms=frozenset({"EdDSA"}))

    def find(kid: str) -> check.SigningKey:
        raise LookupError(kid)

    with pytest.raises(VerifierError) as refused:
        check.open_jws(signer().token(claims()), narrow, find)
    assert refused.value.code == "bad_algorithm"
    with pytest.raises(LookupError, match="first"):
        check.open_jws(signer("EdDSA").token(claims()), narrow, find)


def test_types_are_compared_in_ascii() -> None:
    """The Kelvin sign is a capital k to Python, and to no reader of RFC 7515 §4.1.9."""
    expected = dataclasses.replace(EXPECTED, types=frozenset({"k+jwt"}))

    find = keyset.parse(key_set()).get
    assert check.open_jws(signer().token(claims(), typ="K+jwt"), expected, find)
    with pytest.raises(VerifierError) as refused:
        check.open_jws(signer().token(claims(), typ="\u212a+jwt"), expected, find)
    assert refused.value.code == "wrong_type"


def test_a_signing_key_is_used_under_its_own_name_only() -> None:
    """Step 4, whatever the finder hands out: `kid` is what a feed and a withdrawal speak of."""
    token, key = signer().token(claims(), kid="First"), keyset.parse(key_set())["first"]

    with pytest.raises(check.NoSigningKey) as refused:
        check.open_jws(token, EXPECTED, lambda kid: key)
    assert (refused.value.kid, refused.value.code) == ("First", "unknown_signing_key")
    assert refused.value.detail == UnknownSigningKey().detail
    assert check.open_jws(signer().token(claims()), EXPECTED, lambda kid: key)[0] is key


# Signature


def test_an_es256_signature_of_another_length_is_none_even_if_its_numbers_fit() -> None:
    """
    R and S are read from 32 bytes each: a zero in front of S would change no number.

    Nor would it be missed where S begins with one.  RFC 7518 §3.4.
    """
    for number in range(10_000):
        header, payload, _ = signer().token(claims(jti=str(number))).split(".")
        good = signer().signature(f"{header}.{payload}".encode())
        longer = good[:32] + b"\0" + good[32:]
        assert refusal(f"{header}.{payload}.{base64url(longer)}").code == "bad_signature"
        if good[32] == 0:
            shorter = good[:32] + good[33:]
            assert refusal(f"{header}.{payload}.{base64url(shorter)}").code == "bad_signature"
            assert accept(f"{header}.{payload}.{base64url(good)}")
            return
    pytest.fail("no signature begins with zero")


# Payload


def test_a_payload_has_at_most_100_arrays_and_objects() -> None:
    """RFC 8725 §3.7.  One is the payload itself, one holds the others."""
    assert accept(signer().token(claims(x=[[]] * 98)))
    assert refusal(signer().token(claims(x=[[]] * 99))).code == "token_malformed"
    assert accept(signer().token(claims(x=[{}] * 98)))
    assert refusal(signer().token(claims(x=[{}] * 99))).code == "token_malformed"


@pytest.mark.parametrize("most", [1, 2, 100])
def test_objects_without_any_array_are_counted_too(most: int) -> None:
    """Also where commas tell nothing, because each of them has one member."""
    text = b'{"x":' * most + b"1" + b"}" * most

    assert check.json_object(text, most)
    with pytest.raises(ValueError, match="too many"):
        check.json_object(b'{"x":' + text + b"}", most)


@pytest.mark.parametrize("text", ["a,b", "a,,,,b", '{"a":1,"b":2}', "[1,2]", "{", "[", ",", "\\,"])
def test_what_looks_like_grammar_in_a_text_is_text(text: str) -> None:
    """Scopes and names of others hold anything; a comma in one must not refuse a token."""
    accepted = accept(signer().token(claims(x=text, project_id=ABSENT)))

    assert accepted["x"] == text


@pytest.mark.parametrize(
    "blank", ["x", "X", "\v", "\f", "\x1c", "\x85", "\u00a0", "\u2028", "\ufeff"]
)
def test_only_the_four_blanks_of_json_may_stand_around_it(blank: str) -> None:
    """RFC 8259 §2.  What Python calls a blank is more than that."""
    text = as_json(claims()).decode()
    for payload in (blank + text, text + blank):
        token = signer().token_of(as_json(signer().header()), payload.encode())
        assert refusal(token).code == "token_malformed"


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "[NaN]", '{"y":-Infinity}'])
def test_no_number_that_is_none_stands_anywhere(constant: str) -> None:
    """RFC 8259 §6: also where no check of ours would look at the value."""
    payload = as_json(claims()).replace(b"{", f'{{"x":{constant},'.encode())

    token = signer().token_of(as_json(signer().header()), payload)
    assert refusal(token).code == "token_malformed"


def test_every_scanner_refuses_what_is_no_number_and_hands_over_each_member() -> None:
    """Both of them, flat or not: json.loads takes these without a word.  RFC 8259 §6."""
    for scan in (check._scanner(), check._scanner(list)):
        for text in ("NaN", "-Infinity", "1e400", "-1e400"):
            with pytest.raises(ValueError, match=r"no JSON|too large"):
                scan(text, 0)
        assert scan(" 0.5", 1) == (0.5, 4)

    assert check._scanner(list)('{"a":1,"a":2}', 0) == ([("a", 1), ("a", 2)], 13)
    assert check._scanner()('{"a":1,"a":2}', 0) == ({"a": 2}, 13)


AROUND: dict[str, Callable[[int], object]] = {
    "nothing": lambda number: number,
    "an array": lambda number: [number],
    "an object": lambda number: {"y": [{"z": number}]},
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_integer_has_63_bits(sign: int, around: Callable[[int], object]) -> None:
    """RFC 8259 §6: larger ones are not the same number to everybody, wherever they stand."""
    largest = 2**63 - 1

    assert accept(signer().token(claims(x=around(sign * largest))))
    assert refusal(signer().token(claims(x=around(sign * (largest + 1))))).code == "token_malformed"


def in_a_full_stack(run: Callable[[], None], room: int) -> None:
    """Call it where so many more calls fit onto the stack."""

    def down(left: int) -> None:
        run() if left <= 0 else down(left - 1)

    depth, frame = 0, inspect.currentframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    down(sys.getrecursionlimit() - depth - room)


#: As deep as a token may nest, and with an escape, which is looked at once more.
DEEP = b'{"y":"\\\\","z":' + b"[" * 95 + b"]" * 95 + b"}"


def deep_header(number: int) -> Callable[[], object]:
    header = as_json(signer().header(n=number, x=0)).replace(b'"x":0', b'"x":' + DEEP)
    text = f"{base64url(header)}.AAAA.AAAA"
    return lambda: refused_at_the_signature(text)


def refused_at_the_signature(text: str) -> object:
    """Take a token whose header can be read as far as its signature, which is none."""
    with pytest.raises(VerifierError) as refused:
        check.open_jws(text, EXPECTED, keyset.parse(key_set()).get)
    if refused.value.code != "bad_signature":
        raise refused.value
    return text


def deep_payload(number: int) -> Callable[[], object]:
    payload = as_json(claims(n=number, x=0)).replace(b'"x":0', b'"x":' + DEEP)
    text = signer().token_of(as_json(signer().header()), payload)
    find = keyset.parse(key_set()).get
    return lambda: check.check_signed(text, EXPECTED, find).claims["x"]


@pytest.mark.parametrize("deep", [deep_header, deep_payload], ids=["header", "payload"])
def test_a_caller_whose_stack_is_nearly_full_gets_an_answer(
    deep: Callable[[int], Callable[[], object]],
) -> None:
    """
    A web framework under ten middlewares is deep already, and a token nests as deep as it may.

    Python counts differently in its versions, so that it may be read or refused; but
    RecursionError is no answer, and neither is a claim of which a part is gone.
    """
    answers = []
    for room in range(60, 240):
        run = deep(room)

        def answer(run: Callable[[], object] = run) -> None:
            try:
                answers.append("read" if run() else "lost")
            except VerifierError as refused:
                answers.append(refused.code)

        in_a_full_stack(answer, room)

    assert set(answers) <= {"read", "token_malformed"}
    assert answers[-1] == "read"


# Claims

MALFORMED: dict[str, tuple[dict[str, object], str]] = {
    "iat before 1970": ({"iat": -1}, "iat is no time in whole seconds"),
    "iat after 9999": ({"iat": LAST_SECOND + 1}, "iat is no time in whole seconds"),
    "iat fraction": ({"iat": NOW - 0.5}, "iat is no time in whole seconds"),
    "exp before 1970": ({"exp": -1}, "exp is no time in whole seconds"),
    "exp after 9999": ({"exp": LAST_SECOND + 1}, "exp is no time in whole seconds"),
    "nbf after 9999": ({"nbf": LAST_SECOND + 1}, "nbf is no time"),
    "nbf long ago": ({"nbf": -LAST_SECOND - 1}, "nbf is no time"),
    "nbf giant": ({"nbf": 1e300}, "nbf is no time"),
    "nbf giant, ago": ({"nbf": -1e300}, "nbf is no time"),
    "aud of numbers": ({"aud": [1]}, "aud does not hold texts"),
    "aud partly of numbers": ({"aud": [AUDIENCE, 1]}, "aud does not hold texts"),
    "must text": ({"must": "scope"}, "must does not hold texts"),
    "must partly of numbers": ({"must": ["scope", 1]}, "must does not hold texts"),
    "must null": ({"must": None}, "must does not hold texts"),
    **{
        f"{name} empty": ({name: ""}, f"{name} is empty")
        for name in ("iss", "sub", "client_id", "jti", "org_id", "env", "project_id")
    },
    **{
        f"{name} null": ({name: None}, f"{name} is no text")
        for name in ("iss", "sub", "client_id", "jti", "org_id", "env", "project_id")
    },
}


@pytest.mark.parametrize(("changes", "sentence"), MALFORMED.values(), ids=MALFORMED)
def test_a_claim_that_is_refused_is_named(changes: dict[str, object], sentence: str) -> None:
    """Whoever runs the issuer has to find out which one; its name is ours and no input."""
    error = refusal(signer().token(claims(**changes)))

    assert error.code == "token_malformed"
    assert error.detail == f"The claim {sentence}."


GOOD: dict[str, dict[str, object]] = {
    "iat 0": {"iat": 0},
    "exp at the end of 9999": {"exp": LAST_SECOND},
    "nbf as early as can be": {"nbf": -LAST_SECOND},
    "empty scope": {"scope": ""},
    "empty text of somebody else's": {"x": ""},
    "null of somebody else's": {"x": None},
    "no project": {"project_id": ABSENT},
}


@pytest.mark.parametrize("changes", GOOD.values(), ids=GOOD)
def test_what_just_fits_is_accepted(changes: dict[str, object]) -> None:
    """A limit that is too tight is an outage."""
    assert accept(signer().token(claims(**changes)))


@pytest.mark.parametrize("name", ["iat", "nbf"])
def test_a_start_at_the_end_of_time_is_a_time_all_the_same(name: str) -> None:
    """It is told as what it is: not yet."""
    assert refusal(signer().token(claims(**{name: LAST_SECOND}))).code == "token_from_future"


@pytest.mark.parametrize("name", ["iat", "nbf"])
def test_the_leeway_ahead_ends_to_the_millisecond(name: str) -> None:
    """RFC 7519 §4.1.5: exactly the leeway is still within it."""
    token = signer().token(claims(**{name: NOW + 100}))

    assert accept(token, now=NOW + 70)
    assert refusal(token, now=NOW + 69.999).code == "token_from_future"


@pytest.mark.parametrize(("iat", "nbf"), [(NOW + 31, NOW), (NOW, NOW + 31)])
def test_of_iat_and_nbf_the_later_one_counts(iat: int, nbf: int) -> None:
    """Neither takes back what the other one says."""
    assert refusal(signer().token(claims(iat=iat, nbf=nbf))).code == "token_from_future"
    assert signed(signer().token(claims(iat=iat, nbf=nbf))).starts_at == NOW + 31


# Use


def test_the_name_that_the_token_was_made_for_is_told() -> None:
    """A resource server with two names can tell which one its caller knows."""
    for audience, told in (
        (AUDIENCE, AUDIENCE),
        ("urn:second-name", "urn:second-name"),
        (["urn:nobody", "urn:second-name", AUDIENCE], "urn:second-name"),
    ):
        accepted = signed(signer().token(claims(aud=audience)))
        assert check.check_use(accepted, EXPECTED, NOW, Situation()) == told


def test_a_wrong_issuer_or_audience_is_told_which_one_is_right() -> None:
    """What this resource server expects is no secret, and what came is not repeated."""
    wrong_issuer = refusal(signer().token(claims(iss="https://evil.example")))
    wrong_audience = refusal(signer().token(claims(aud="https://evil.example")))

    assert wrong_issuer.detail.endswith(f"than {ISSUER}")
    assert wrong_audience.detail.endswith(f"one for {AUDIENCE}")


def test_a_signing_key_is_told_by_its_members_alone() -> None:
    """Two readings of one key set are equal, and a log line shows no function."""
    one, other = (keyset.parse(key_set())["first"] for _ in range(2))

    assert one == other
    assert one.verify is not other.verify
    assert "verify" not in repr(one)
    assert one != dataclasses.replace(one, members=())


def test_what_is_expected_is_given_by_name() -> None:
    """Of two sets of texts side by side nobody sees that they were swapped."""
    form: Any = check.Form
    expected: Any = check.Expected
    named = {"types": frozenset[str](), "algorithms": frozenset[str]()}

    assert form(**named)
    with pytest.raises(TypeError):
        form(*named.values())
    with pytest.raises(TypeError):
        expected(ISSUER, (AUDIENCE,), 30, **named)


VALUES: dict[str, Callable[[], Any]] = {
    "SigningKey": lambda: keyset.parse(key_set())["first"],
    "Expected": lambda: EXPECTED,
    "Form": lambda: check.Form(types=frozenset(), algorithms=frozenset()),
    "Header": lambda: check.Header(None, "ES256", "first"),
    "SignedClaims": lambda: signed(signer().token(claims())),
    "Situation": Situation,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_what_a_step_found_out_cannot_be_changed_afterwards(value: Callable[[], Any]) -> None:
    """Threads share these, and the later steps rely on them."""
    made = value()
    name = getattr(made, "_fields", None) or [one.name for one in dataclasses.fields(made)]

    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        setattr(made, name[0], "changed")
