"""SQL as a tree: which tables a statement names, and whether it only reads."""

from dataclasses import dataclass

from sqlglot import exp, parse_one
from sqlglot.dialects.postgres import Postgres
from sqlglot.errors import ParseError, SqlglotError
from sqlglot.tokens import TokenType

from gpl_core.errors import UsageError

_QUERIES = ("select", "with", "values")
_EXPLAIN_OPTIONS = {"analyze", "verbose", "format", "tree", "indent"}
_WRITES = (exp.DML, exp.DDL, exp.Drop, exp.Alter, exp.Into, exp.Command)
# E'…\'…' and the like: the engine and this parser may disagree about where such a string ends.
_ODD_STRINGS = {
    TokenType.BIT_STRING, TokenType.BYTE_STRING, TokenType.HEREDOC_STRING, TokenType.NATIONAL_STRING,
    TokenType.PARAMETER, TokenType.RAW_STRING, TokenType.UNICODE_STRING,
}  # fmt: skip


class DataFusion(Postgres):
    """The dialect of delta-rs' engine, for queries."""

    class Tokenizer(Postgres.Tokenizer):
        IDENTIFIERS = ['"', "`"]  # noqa: RUF012
        COMMANDS = set()  # noqa: RUF012
        KEYWORDS = {**Postgres.Tokenizer.KEYWORDS, "DIV": TokenType.DIV, "EXPLAIN": TokenType.VAR}  # noqa: RUF012


@dataclass(frozen=True)
class Statement:
    """A statement that only reads: its first word, and the names (lower case) of tables and views in it."""

    kind: str
    names: frozenset[str]


def quoted(text: str, dialect: type[DataFusion] | str = DataFusion) -> str:
    """`text` as a string literal."""
    return exp.Literal.string(text).sql(dialect)


def names_in(tree: exp.Expr) -> frozenset[str]:
    """Names in lower case of what `tree` reads: tables, views, and its own common table expressions."""
    return frozenset(table.name.lower() for table in tree.find_all(exp.Table))


def check_reads(sql: str) -> Statement:
    """Parse one statement: SELECT, WITH, VALUES, EXPLAIN of one of them, DESCRIBE or SHOW TABLES; else UsageError."""
    try:
        tokens = DataFusion().tokenize(sql)
    except SqlglotError as error:
        raise _not_understood(error) from None
    words = [t.text.lower() for t in tokens]
    kind = next((w for w in words if w != "("), "")
    if kind not in (*_QUERIES, "explain", "describe", "desc", "show"):
        raise UsageError(
            f"gpl sql only reads: SELECT, WITH, VALUES, EXPLAIN, DESCRIBE name or SHOW TABLES; found '{kind or sql}'"
        )
    if any(t.token_type is TokenType.SEMICOLON for t in tokens):
        raise UsageError("gpl sql takes one statement; remove what follows the ';'")
    if any(t.token_type in _ODD_STRINGS for t in tokens):
        raise UsageError("gpl sql takes plain strings only: '…' with '' for a quote")
    if kind == "show":
        if words != ["show", "tables"]:
            raise UsageError("SHOW TABLES is the only SHOW statement in gpl sql; for columns use DESCRIBE name")
        return Statement(kind, frozenset())
    if kind in ("describe", "desc"):
        if len(words) != (3 if words[1:2] == ["table"] else 2):
            raise UsageError("expected DESCRIBE and the name of one table or view")
        return Statement("describe", frozenset(words[-1:]))
    if kind == "explain":
        explained = next((t for t in tokens[1:] if t.text.lower() not in _EXPLAIN_OPTIONS), tokens[0])
        sql = sql[explained.start :]
    return Statement(kind, names_in(parse_query(sql)))


def parse_query(sql: str) -> exp.Expr:
    """The tree of one SELECT, WITH or VALUES; UsageError when it does not parse, or does more than reading."""
    try:
        tree = parse_one(sql, dialect=DataFusion)
    except SqlglotError as error:
        raise _not_understood(error) from None
    writing = tree.find(*_WRITES) or (None if isinstance(tree, exp.Query | exp.Values) else tree)
    if writing is not None:
        raise UsageError(f"gpl sql only reads; '{writing.key.upper()}' is not a query")
    return tree


def _not_understood(error: SqlglotError) -> UsageError:
    found = error.errors[0] if isinstance(error, ParseError) and error.errors else {}
    if not found:
        return UsageError(f"SQL: {error}")
    return UsageError(f"SQL: not understood at '{found['highlight']}' (line {found['line']}, column {found['col']})")
