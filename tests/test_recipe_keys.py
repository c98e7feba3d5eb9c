"""docs/recipes.md says what the code takes."""

from pathlib import Path

from fewstep.recipe_keys import recipe_keys


def test_the_page_is_the_output_of_the_command() -> None:
    page = Path(__file__).parents[1] / "docs" / "recipes.md"
    assert page.read_text(encoding="utf-8") == recipe_keys(), "run: fewstep keys > docs/recipes.md"
