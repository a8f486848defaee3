#!/usr/bin/python3
"""Counts visits in PostgreSQL: one row per visit."""
import http.server
import socket

import psycopg2


def query(statement):
    connection = psycopg2.connect(host="db", dbname="shop", user="shop", connect_timeout=5)
    with connection, connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchone()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        try:
            if self.path == "/healthz":
                query("SELECT 1")
                text = "ok\n"
            else:
                query("INSERT INTO visits DEFAULT VALUES RETURNING id")
                text = "visit %d, served by %s\n" % (*query("SELECT count(*) FROM visits"), socket.gethostname())
            self.answer(200, text)
        except psycopg2.Error as error:
            self.answer(503, "the database says: %s\n" % error)

    def answer(self, status, text):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


# Two servers may begin at once: the lock has one of them wait.
query("""SELECT pg_advisory_lock(1);
         CREATE TABLE IF NOT EXISTS visits (id serial PRIMARY KEY);
         SELECT pg_advisory_unlock(1)""")
http.server.ThreadingHTTPServer(("", 80), Handler).serve_forever()
