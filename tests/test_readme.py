"""What the README says is so."""

import re
from pathlib import Path

from deploy.settings import TABLE_BEGIN, TABLE_END, render_table, write_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_settings_table_is_that_of_the_settings_models():
    table = README.partition(TABLE_BEGIN)[2].partition(TABLE_END)[0].strip()
    assert table == render_table(), "run: python -m deploy.settings"


def test_writing_the_table_keeps_the_rest_of_the_page(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{TABLE_BEGIN}\nold\n{TABLE_END}\nafter\n")
    write_table(page)
    assert page.read_text() == f"before\n{TABLE_BEGIN}\n{render_table()}\n{TABLE_END}\nafter\n"


def test_every_variable_that_the_readme_names_is_a_setting():
    known = set(re.findall(r"`(TOKENLINE_\w+)`", render_table())) | {"TOKENLINE_URL", "TOKENLINE_API_KEY"}
    assert set(re.findall(r"TOKENLINE_\w+", README)) <= known


def test_every_file_that_the_readme_links_to_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith(("http", "#"))]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_make_target_that_the_readme_names_is_there():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?m)(?:`|^)make ([a-z]+)", README)) <= targets
