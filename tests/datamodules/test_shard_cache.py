import errno
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from datamodules import shard_cache
from datamodules.shard_cache import ShardCache, expand_urls
from tests.datamodules.web import Web, serving

SIZE = 100_000
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """Five shards on a server, and no patience."""
    monkeypatch.setattr(shard_cache, "PAUSES", (0.01, 0.02))
    (tmp_path / "web").mkdir()
    for number in range(5):
        (tmp_path / f"web/{number}.tar").write_bytes(bytes([number]) * SIZE)
    with serving(tmp_path / "web") as web:
        yield web


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", limit_gb=3.5 * SIZE / 1e9, allow_shell_pipes=True)


def kept(cache: ShardCache, suffix: str = ".shard") -> int:
    return len(list(cache.folder.glob(f"*{suffix}")))


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


def start(function, *args) -> multiprocessing.Process:
    process = FORK.Process(target=function, args=args)
    process.start()
    return process


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_local_file_is_itself(cache, tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x")
    assert cache.path(str(tmp_path / "a.tar")) == cache.path(f"file://{tmp_path}/a.tar") == tmp_path / "a.tar"
    with pytest.raises(FileNotFoundError, match=r"b\.tar: no such file"):
        cache.path(str(tmp_path / "b.tar"))


def test_a_remote_shard_is_downloaded_once_and_named_by_nothing_of_its_address(web, cache):
    for _ in range(2):
        assert cache.path(f"{web.url}/1.tar?signature=secret").read_bytes() == content(1)
    assert web.count("1.tar") == 1
    assert not [name for name in os.listdir(cache.folder) if "tar" in name or "secret" in name]


def test_processes_wait_for_the_one_that_downloads(web, cache):
    def check() -> None:
        os._exit(cache.path(f"{web.url}/2.tar").read_bytes() != content(2))

    processes = [start(check) for _ in range(6)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert web.count("2.tar") == 1


def test_a_killed_download_leaves_nothing_that_is_taken_for_a_shard(web, cache):
    web.faults["0.tar"] = ["hang", ""]
    process = start(cache.path, f"{web.url}/0.tar")
    wait_for(lambda: any(part.stat().st_size for part in cache.folder.glob("*.part")))
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (kept(cache), kept(cache, ".part")) == (0, 1)
    ShardCache(cache.folder, 1.0)
    assert kept(cache, ".part") == 0
    assert cache.path(f"{web.url}/0.tar").read_bytes() == content(0)


def test_an_unfinished_download_of_another_process_is_left_alone(web, cache):
    web.faults["0.tar"] = ["hang", ""]
    process = start(cache.path, f"{web.url}/0.tar")
    wait_for(lambda: kept(cache, ".part"))
    ShardCache(cache.folder, 1.0)
    assert kept(cache, ".part") == 1
    process.kill()
    process.join(60)


def test_what_was_used_longest_ago_makes_room(web, cache):
    paths = [cache.path(f"{web.url}/{number}.tar") for number in (0, 1, 2)]
    cache.path(f"{web.url}/0.tar")
    paths.append(cache.path(f"{web.url}/3.tar"))
    assert [path.exists() for path in paths] == [True, False, True, True]
    cache.path(f"{web.url}/4.tar")
    assert [path.exists() for path in paths] == [True, False, False, True]
    assert cache.path(f"{web.url}/1.tar").read_bytes() == content(1)


def test_the_folder_never_holds_more_than_the_limit(web, cache):
    for number in (0, 1, 2, 3, 4) * 2:
        path = cache.path(f"{web.url}/{number}.tar")
        assert path.read_bytes() == content(number)
        assert sum(file.stat().st_size for file in cache.folder.iterdir()) <= cache.limit


@pytest.mark.parametrize("fault", ["500", "cut"])
def test_a_passing_fault_is_overcome(fault, web, cache):
    web.faults["0.tar"] = [fault, fault, ""]
    assert cache.path(f"{web.url}/0.tar").read_bytes() == content(0)
    assert web.count("0.tar") == 3


@pytest.mark.parametrize(("fault", "message"), [("500", "500"), ("cut", "not completed|ended after")])
def test_a_lasting_fault_is_told_after_three_attempts(fault, message, web, cache):
    web.faults["0.tar"] = [fault]
    with pytest.raises(OSError, match=rf"0\.tar.*: 3 attempts failed, the last with: .*({message})"):
        cache.path(f"{web.url}/0.tar")
    assert kept(cache) == kept(cache, ".part") == 0


def test_a_server_that_falls_silent_is_given_up(web, cache, monkeypatch):
    monkeypatch.setattr(shard_cache, "PATIENCE", 0.2)
    web.faults["0.tar"] = ["hang"]
    with pytest.raises(OSError, match=r"0\.tar.*: 3 attempts failed, the last with: .*[Tt]imeout"):
        cache.path(f"{web.url}/0.tar")


def test_what_is_not_there_is_not_asked_for_again(web, cache):
    with pytest.raises(FileNotFoundError, match=r"/9\.tar': there is no such file"):
        cache.path(f"{web.url}/9.tar")
    assert web.count("9.tar") <= 1


def test_a_server_that_is_not_there(cache, monkeypatch):
    monkeypatch.setattr(shard_cache, "PAUSES", (0.01, 0.02))
    with pytest.raises(OSError, match=r"3 attempts failed, the last with: Cannot connect to host 127\.0\.0\.1:1 "):
        cache.path("http://127.0.0.1:1/0.tar")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/0.tar", r"'s3://bucket/0\.tar': Install s3fs to access S3"),
        ("nothing://a/0.tar", r"'nothing://a/0\.tar': Protocol not known: nothing"),
    ],
)
def test_protocols_without_a_package(url, message, cache):
    with pytest.raises(ValueError, match=message):
        cache.path(url)


def test_errors_show_no_signature(web, cache):
    web.faults["0.tar"] = ["500"]
    for name in ("9.tar", "0.tar"):
        with pytest.raises(OSError, match=rf"{name}\?\.\.\.'") as info:
            cache.path(f"{web.url}/{name}?X-Amz-Signature=secret")
        assert "secret" not in str(info.value)


def test_the_output_of_a_command_is_a_shard(cache):
    assert cache.path("pipe:echo one | tr o O").read_text() == "One\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo start; echo no credentials >&2; exit 3", "exit code 3, 6 bytes: no credentials"),
        ("cat /no/such/file | cat", "exit code 1, 0 bytes: cat: /no/such/file: No such file"),
        ("true", r"exit code 0, 0 bytes: \(it wrote no message\)"),
        ("no_such_command", "exit code 127, 0 bytes: .*no_such_command: command not found"),
        ("kill -9 $$", "exit code -9, 0 bytes"),
    ],
)
def test_a_command_that_fails_is_told_with_its_last_words(command, message, cache, monkeypatch):
    monkeypatch.setattr(shard_cache, "PAUSES", (0.0, 0.0))
    with pytest.raises(OSError, match=rf"'pipe:.*': 3 attempts failed, the last with: {message}"):
        cache.path(f"pipe:{command}")
    assert kept(cache) == kept(cache, ".part") == 0


def test_commands_are_run_only_where_that_is_allowed(tmp_path):
    cache = ShardCache(tmp_path / "cache", 1.0)
    with pytest.raises(ValueError, match=r"commands are run only if `data\.init_args\.allow_shell_pipes` is true"):
        cache.path(f"pipe:touch {tmp_path}/done")
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), float("inf")])
def test_an_unusable_limit(limit, tmp_path):
    with pytest.raises(ValueError, match=r"cache_gb is .*; expected gigabytes"):
        ShardCache(tmp_path, limit)


def test_a_shard_larger_than_the_cache_is_not_downloaded(web, tmp_path):
    cache = ShardCache(tmp_path / "cache", limit_gb=SIZE / 2e9)
    with pytest.raises(ValueError, match=r"0\.tar' has 0\.0001 GB, but the cache may hold only 5e-05 GB"):
        cache.path(f"{web.url}/0.tar")
    assert web.count("0.tar") == 0


@pytest.mark.parametrize("folder", ["file/cache", "/proc/cache"])
def test_a_folder_that_cannot_be_written_to(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cache: shards cannot be kept here .*`data\.init_args\.cache_dir`"):
        ShardCache(tmp_path / folder, 1.0)


def test_a_full_disk_is_told_at_once(cache):
    attempts = []

    def write(part: Path) -> None:
        attempts.append(part)
        Path("/dev/full").write_bytes(b"x")

    with pytest.raises(OSError, match=r"cache: the disk is full while a shard is copied to it.*cache_gb") as info:
        cache.copy("key", "a shard", lambda part: shard_cache.persist("a shard", lambda: write(part)))
    assert len(attempts) == 1
    assert info.value.__cause__.errno == errno.ENOSPC


def test_shards_are_fetched_ahead_in_order(web, cache):
    cache.prefetch([f"{web.url}/{number}.tar" for number in (3, 1)])
    wait_for(lambda: kept(cache) == 2)
    assert [name for method, name, _ in web.asked if method == "GET"] == ["3.tar", "1.tar"]


def test_fetching_ahead_stops_at_half_of_the_cache_and_a_new_list_replaces_the_old(web, cache):
    cache.prefetch([f"{web.url}/{number}.tar" for number in (0, 1, 2, 3)])
    wait_for(lambda: kept(cache) == 2)
    time.sleep(0.3)
    assert kept(cache) == 2  # of 3.5
    cache.prefetch([f"{web.url}/4.tar"])
    wait_for(lambda: kept(cache) == 3)
    assert web.count("3.tar") == 0


def test_what_cannot_be_fetched_ahead_is_told_to_whom_it_concerns(web, cache):
    cache.prefetch([f"{web.url}/9.tar", f"{web.url}/0.tar"])
    wait_for(lambda: kept(cache) == 1)
    with pytest.raises(FileNotFoundError):
        cache.path(f"{web.url}/9.tar")


def test_a_cache_that_fetches_ahead_can_be_sent_and_forked(web, cache):
    cache.prefetch([f"{web.url}/0.tar"])
    sent = pickle.loads(pickle.dumps(cache))
    assert sent.path(f"{web.url}/0.tar").read_bytes() == content(0)

    def check() -> None:
        cache.prefetch([f"{web.url}/2.tar"])
        wait_for(lambda: kept(cache) == 2)
        os._exit(0)

    process = start(check)
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("source", "urls"),
    [
        ("http://a/{00..02}.tar", ["http://a/00.tar", "http://a/01.tar", "http://a/02.tar"]),
        ("http://a/{8..11}", ["http://a/8", "http://a/9", "http://a/10", "http://a/11"]),
        ("s3://a/{x,y}-{0..1}", ["s3://a/x-0", "s3://a/x-1", "s3://a/y-0", "s3://a/y-1"]),
        ("http://a/1::http://b/2", ["http://a/1", "http://b/2"]),
        (["http://a/{1,2}", "http://b"], ["http://a/1", "http://a/2", "http://b"]),
        ("pipe:aws s3 cp s3://b/{00..01}.tar -", ["pipe:aws s3 cp s3://b/00.tar -", "pipe:aws s3 cp s3://b/01.tar -"]),
        ("pipe:cat ${HOME}/a | awk '{print $1}'", ["pipe:cat ${HOME}/a | awk '{print $1}'"]),
    ],
)
def test_addresses_are_written_out(source, urls):
    assert expand_urls(source) == urls


def test_local_files_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a", "odd{1}"):
        (tmp_path / f"{name}.tar").touch()
    assert expand_urls("[ab].tar") == ["a.tar", "b.tar"]
    assert expand_urls("{b,a}.tar") == ["b.tar", "a.tar"]
    assert expand_urls("odd{1}.tar") == ["odd{1}.tar"]
    assert expand_urls(f"file://{tmp_path}/*b.tar") == [f"{tmp_path}/b.tar"]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("", ValueError, "empty entry"),
        ("http://a:: ", ValueError, "empty entry"),
        ([], ValueError, "The list of shards is empty"),
        ("http://a/{00..02.tar", ValueError, r"expected braces as in \{00000\.\.00644\}"),
        ("http://a/{x}.tar", ValueError, r"expected braces as in"),
        ("http://a/{a..c}.tar", ValueError, r"expected braces as in"),
        ("http://a/{5..2}.tar", ValueError, r"\{5\.\.2\}: expected a range that rises"),
        ("http://a/{0..99999999}.tar", ValueError, r"at most a million numbers"),
        ("http://a/{1,1}.tar", ValueError, r"'http://a/1\.tar' is named twice"),
        ("/no/such/*.tar", FileNotFoundError, r"'/no/such/\*\.tar': nothing found"),
        ("/no/such/{0..1}.tar", FileNotFoundError, r"'/no/such/0\.tar': nothing found"),
        ("s3://bucket/*.tar", ValueError, "Install s3fs"),
    ],
)
def test_addresses_that_name_no_shards(source, error, message):
    with pytest.raises(error, match=message):
        expand_urls(source)
