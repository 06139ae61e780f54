"""Rollout workers and a trainer: how far apart they may be is one number.

| file | what |
| --- | --- |
| config | what a system is told |
| core | what its parts share, and the six events that change it |
| live | threads that draw, and the step that learns |
| schedule | the events, as they happened |
| replay | the same events again: the same bits |
| placement | actor, critic, reference and reward on one mesh or on meshes of their own |
"""

from align.system.config import SystemConfig
from align.system.core import System
from align.system.live import Live
from align.system.replay import Replay
from align.system.schedule import Event, Schedule

__all__ = ["Event", "Live", "Replay", "Schedule", "System", "SystemConfig"]
