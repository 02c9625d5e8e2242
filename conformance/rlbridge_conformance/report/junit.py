"""junit.xml, which pytest writes, without secrets: it holds what failed checks have printed."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from rlbridge_conformance.report.redact import redact_text


def redact_junit(path: Path) -> None:
    """Take the secrets out of every text and attribute of the file, and the name of the host."""
    tree = ET.parse(path)
    for element in tree.iter():
        element.text, element.tail = _redacted(element.text), _redacted(element.tail)
        element.attrib = {name: redact_text(value) for name, value in element.attrib.items() if name != "hostname"}
    temporary = path.with_name(f".{path.name}")
    tree.write(temporary, encoding="utf-8", xml_declaration=True)
    temporary.replace(path)


def _redacted(text: str | None) -> str | None:
    return text if text is None else redact_text(text)
