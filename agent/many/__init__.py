"""Many agents: as tools of one another, in turns, side by side, by mail, around a blackboard, in a
vote, and as the nodes of a graph."""

from agent.many.blackboard import Blackboard, Specialist, solve
from agent.many.consensus import NoQuorum, quorum
from agent.many.graph import Graph, Interrupt, run_graph
from agent.many.mail import Deadlock, Exchange, Mail, Mailbox
from agent.many.patterns import (
    Loop,
    agent_tool,
    debate,
    group_chat,
    map_reduce,
    sequential,
    supervisor,
)

__all__ = [
    "Blackboard", "Deadlock", "Exchange", "Graph", "Interrupt", "Loop", "Mail", "Mailbox",
    "NoQuorum", "Specialist", "agent_tool", "debate", "group_chat", "map_reduce", "quorum",
    "run_graph", "sequential", "solve", "supervisor",
]  # fmt: skip
