"""What outlives its process: conversations that are kept on disk or in a database."""

from fractal.durable.conversations import (
    Conversation as Conversation,
    ConversationInfo as ConversationInfo,
    Conversations as Conversations,
)
from fractal.durable.conversations_postgres import PostgresConversations as PostgresConversations
from fractal.durable.conversations_sqlite import SQLiteConversations as SQLiteConversations

__all__ = ["Conversation", "ConversationInfo", "Conversations", "PostgresConversations", "SQLiteConversations"]
