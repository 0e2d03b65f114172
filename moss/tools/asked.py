"""What a question asks for, and how a sentence looks that holds it: a year, a height, a place, a person.

    of_its_kind("How deep is Lake Baikal?", "The lake is 1,642 metres deep.")          # 0.7

The types of answers of question answering, by words alone, for English and Chinese. They help a summary of few
sentences to keep the right one: "depth" and "deep" are different words, but both ask for metres.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of answer; `weight` is more where the look of a sentence tells more."""

    weight: float
    asks: re.Pattern[str]
    looks: re.Pattern[str]


def _kind(weight: float, asks: str, looks: str) -> Kind:
    return Kind(weight, re.compile(asks, re.IGNORECASE), re.compile(looks))


_CHINESE_NUMBER = r"(?<![\d.,])\d[\d.]{0,20}[万亿多余]{0,4}"
_NUMBER = r"(?<![\d.,])\d[\d,.]{0,20} ?(?:million |billion |thousand |Earth )?"
KINDS = (
    _kind(
        0.7,
        r"\b(height|high|tall|length|long|depth|deep|width|wide|diameter|distance|far|size|big|large|tallest|longest)\b"
        r"|多[高长深宽远大]|[高长深宽]度|直径|距离|海拔|身高|体型|大小|总长|全长",
        _NUMBER + r"(?:metres|kilometres|centimetres|millimetres|meters|kilometers|km|cm|mm|m|feet|miles|light-years)\b"
        r"|" + _CHINESE_NUMBER + r"(?:米|千米|公里|厘米|毫米|光年)",
    ),
    _kind(
        0.7,
        r"\b(weight|weigh|weighs|heavy|mass)\b|多重|[重质]量|体重",
        _NUMBER + r"(?:kilograms?|tonnes?|grams?|kg|pounds)\b|" + _CHINESE_NUMBER + r"(?:千克|公斤|吨|克)",
    ),
    _kind(0.7, r"\b(speed|fast)\b|速度|多快", r"\b(?:per|an|a) (?:hour|second|minute)\b|每(?:小时|秒|分)|时速"),
    _kind(0.7, r"\barea\b|面积", r"\bsquare (?:kilo)?(?:metres|miles)\b|平方"),
    _kind(
        0.7,
        r"\b(temperature|hot|cold|warm|melts?|melting|boils?|boiling|liquid)\b|温度|多热|多冷|熔|沸|气温|体温",
        r"\b(?:degrees|kelvins?)\b|摄氏|℃|度",
    ),
    _kind(
        0.7,
        r"\b(age|old|lifespan|live|lives|period|pregnancy|pregnant|lasts?|takes?|how long)\b"
        r"|寿命|多久|多长时间|历史|怀孕|周期|活|时间",
        _NUMBER + r"(?:years?|days?|months?|weeks?|hours?|minutes?|seconds?)\b"
        r"|" + _CHINESE_NUMBER + r"个?(?:年|天|月|小时|分钟|地球日|周|秒)",
    ),
    _kind(0.7, r"\b(population|inhabitants)\b|人口", r"\b(?:million|billion)\b|人口|万人"),
    _kind(
        0.7,
        r"\b(made of|made from|consists?|ingredients?|contains?|composition|materials?)\b"
        r"|组成|材料|成分|原料|做的|制成",
        r"\b(?:made|consists?|contains?|mixture|alloy|composed|mainly)\b|组成|制成|构成|含有|合金|混合|做成|主要",
    ),
    _kind(
        0.7,
        r"\b(where|origin|located|come from|comes from|birthplace|born in)\b"
        r"|哪里|哪儿|何处|哪个国家|起源|产地|发源|原产|出生地",
        r"\b(?:located|lies|stands|originated?|native|border|came from|comes from|born)\b|\bin (?:the )?[A-Z]"
        r"|位于|起源|原产|发源|来自|境内|出生|生于",
    ),
    _kind(
        0.7,
        r"\b(why|causes?|how do|how does|reason|principle)\b|为什么|原因|原理|怎么形成|如何",
        r"\b(?:because|caused?|when|by|through|produces?|makes?|so that)\b|因为|由于|原因|使|产生|形成|通过|利用|靠",
    ),
    _kind(
        0.7,
        r"\b(who(se|m)?|inventor|invented by|founder|designer|architect|painter|composer|author|discoverer)\b"
        r"|\bwhich (\w+ )?(man|woman|person|king|queen|emperor|scientist|doctor|physician|poet|writer|explorer)\b"
        r"|谁|哪位|何人|发明者|发明人|设计师|设计者|创始人|作者|作曲",
        r"(?<!^)\b[A-Z][\w'é]{1,30} (?:[a-z]{1,30} )?[A-Z][\w'é]|·",
    ),
    _kind(
        0.4,
        r"\b(when|years?|(what|which) date|century|birth|death|born|died|opening|founded|invention|discovery)\b"
        r"|[哪几]一?年|何[时年]|什么时候|年份|世纪|时间|出生|去世|逝世",
        r"(?<!\d)\d{3,4}(?!\d)|\bcentury\b|世纪",
    ),
    _kind(
        0.4,
        r"\bhow (many|much)\b|\b(number|percentage|amount)\b|多少|几|数量",
        r"\d|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|twelve|half|hundred|thousand|million|billion)\b"
        r"|[一两二三四五六七八九十百千]",
    ),
)


def of_its_kind(question: str, sentence: str) -> float:
    """How much a sentence looks like one that holds what the question asks for; 0 where nothing speaks for it."""
    return max((kind.weight for kind in _kinds(question) if kind.looks.search(sentence)), default=0.0)


@lru_cache(maxsize=16)
def _kinds(question: str) -> list[Kind]:
    """What a question asks for; looked up once for all sentences of a page."""
    return [kind for kind in KINDS if kind.asks.search(question)]
