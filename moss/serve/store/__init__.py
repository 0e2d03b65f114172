"""What the service remembers, in SQLite or PostgreSQL.

`tables.py` says what there is, `database.py` opens it and moves it to the newest schema, `migrations/` holds the ways
there. Everything a person owns carries the owner's id, and is reached through queries that name it.
"""
