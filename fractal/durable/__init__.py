"""What outlives its process: durable runs in a journal, and conversations in a store."""

from fractal.durable.conversations import (
    Conversation as Conversation,
    ConversationInfo as ConversationInfo,
    Conversations as Conversations,
)
from fractal.durable.conversations_postgres import PostgresConversations as PostgresConversations
from fractal.durable.conversations_sqlite import SQLiteConversations as SQLiteConversations
from fractal.durable.dbos_agent import (
    DurableAgent as DurableAgent,
    DurableOptions as DurableOptions,
)
from fractal.durable.dbos_run import DurableEvents as DurableEvents, DurableRun as DurableRun
from fractal.durable.memory import MemoryJournal as MemoryJournal
from fractal.durable.sqlite import SQLiteJournal as SQLiteJournal
from fractal.journal import Journal as Journal, OpenJournal as OpenJournal, StepKey as StepKey

__all__ = [
    "Conversation",
    "ConversationInfo",
    "Conversations",
    "DurableAgent",
    "DurableEvents",
    "DurableOptions",
    "DurableRun",
    "Journal",
    "MemoryJournal",
    "OpenJournal",
    "PostgresConversations",
    "SQLiteConversations",
    "SQLiteJournal",
    "StepKey",
]
