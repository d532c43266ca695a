"""The order of training batches: every example once an epoch, and the same from wherever a stream begins."""

import pytest

from mrjax.data.order import ShuffledOrder, bucket_of_batch


@pytest.mark.parametrize("length", [1, 7, 1000])
def test_every_epoch_holds_each_example_once(length: int) -> None:
    order = ShuffledOrder(length, 3)
    epochs = [[order(epoch * length + i) for i in range(length)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    if length > 1:
        assert len(set(map(tuple, epochs))) > 1
        assert epochs[0] != [ShuffledOrder(length, 4)(i) for i in range(length)]


def test_an_example_does_not_depend_on_those_asked_for_before() -> None:
    whole = ShuffledOrder(10, 3)
    in_order = [whole(position) for position in range(100)]
    jumping = ShuffledOrder(10, 3)
    assert {p: jumping(p) for p in (95, 12, 3, 28, 13, 99, 12)} == {p: in_order[p] for p in (95, 12, 3, 28, 13, 99)}


@pytest.mark.parametrize("lengths", [(7, 18, 5), (40, 1), (12,), (2, 3)])
def test_the_schedule_gives_every_bucket_its_share_in_each_epoch(lengths: tuple[int, ...]) -> None:
    size = 4
    stream = [bucket_of_batch(lengths, size, 3, number) for number in range(300)]
    seen = [0] * len(lengths)
    for number, (bucket, before) in enumerate(stream):
        assert before == seen[bucket]
        seen[bucket] += 1
        epochs = (number + 1) * size / sum(lengths)
        assert all(
            abs(size * count - epochs * length) <= size + length for count, length in zip(seen, lengths, strict=True)
        )
    assert [bucket_of_batch(lengths, size, 3, number) for number in (250, 3, 299)] == [
        stream[number] for number in (250, 3, 299)
    ]
    if len(lengths) == 3:
        assert [s for s, _ in stream] != [bucket_of_batch(lengths, size, 4, n)[0] for n in range(300)]
        epoch = sum(lengths) // size
        assert len({tuple(s for s, _ in stream[n : n + epoch]) for n in range(0, 280, epoch)}) > 10
