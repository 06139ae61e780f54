"""Reasoning over several attempts: samples that vote, plans that are revised, trees and graphs of
thoughts, and prompts that are improved by measuring them."""

from agent.reason.branch import Branch, Budget
from agent.reason.plan import Plan, plan_and_execute
from agent.reason.prompts import Example, Template, few_shot, optimise
from agent.reason.samples import chain_of_thought, self_consistency
from agent.reason.trees import Node, aggregate, by_value, by_vote, tree_of_thoughts

__all__ = [
    "Branch", "Budget", "Example", "Node", "Plan", "Template", "aggregate", "by_value", "by_vote",
    "chain_of_thought", "few_shot", "optimise", "plan_and_execute", "self_consistency",
    "tree_of_thoughts",
]  # fmt: skip
