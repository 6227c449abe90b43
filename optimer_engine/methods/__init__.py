"""Placeholder of the lead's so that the tree imports; engineer B overwrites this file."""

from optimer_engine.methods.protocol import Fold, Method, Operand, Parameter, Tile


class _TaskArithmetic(Method):
    skips_zero = True

    def fold(self, recipe):
        return Fold(True, tuple(recipe.settings.column("weight")))


def get(name):
    return _TaskArithmetic(name, "", "", {"weight": Parameter(float, 1.0, True)})
