import hashlib
import subprocess
import sys

import numpy as np

from megavtp.data.randomness import generator, stable_hash


def test_the_hash_is_blake2b_of_the_tags():
    digest = hashlib.blake2b(b"(7, 'mask', 3)", digest_size=16).digest()
    assert stable_hash(7, "mask", 3) == int.from_bytes(digest, "little")


def test_another_process_draws_the_same():
    code = "from megavtp.data.randomness import generator; print(generator(1, 'a', 2).random(3).tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == str(generator(1, "a", 2).random(3).tolist())


def test_tags_do_not_run_into_each_other():
    tags = [(1, "a"), (1, "a", "b"), (1, "ab"), (1, "a', 'b"), (1, "a", 1), (1, "a", "1"), (11, "a"), (1, 1, "a"), (1,)]
    assert len({stable_hash(*t) for t in tags}) == len(tags)
    assert stable_hash(np.int64(1), np.int32(2)) == stable_hash(1, 2)


def test_draws_of_neighbouring_keys_look_independent_and_uniform():
    x = np.stack([generator(0, "crop", step, 5).random(4) for step in range(2000)])
    assert abs(x.mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(x[:-1, 0], x[1:, 0])[0, 1]) < 0.1


def test_the_generator_is_philox_with_the_hash_as_its_key():
    expected = np.random.Generator(np.random.Philox(key=stable_hash(7, "mask", 3)))
    found = generator(7, "mask", 3)
    assert found.random(5).tolist() == expected.random(5).tolist()
    assert found.permutation(100).tolist() == expected.permutation(100).tolist()
