"""The whole product path as a user has it, at real size: `make accept`, or on any contract folder with DATA=DIR.

Nothing of the platform runs in this process: commands, the HTTP server and Feast's SDK are processes of their own, SQL
goes through a connection. Each step asserts what must hold, and tells what it saw.
"""
