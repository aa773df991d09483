"""Recipes as YAML files: what they may say, and the steps and the calibration that they stand for."""

from jaxq.recipes.file import RecipeFile, read_recipe, recipe_files
from jaxq.recipes.steps import calibrate_recipe, to_step

__all__ = ["RecipeFile", "calibrate_recipe", "read_recipe", "recipe_files", "to_step"]
