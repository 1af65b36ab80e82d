"""The whole journey on photos that are drawn here: draw, build, train on ``natural``, fine-tune on ``balanced``.

In: a directory, a seed. Out: ``DIR/photos`` (a folder source with train and test), ``DIR/root`` (its snapshots) and a
``DemoResult`` with the accuracy of many-, medium- and few-shot classes before and after the balanced stage.
Guarantees: the photos are the same bytes for the same seed under the locked dependencies; a second run on one directory
draws only what is missing; nothing here is needed by any other room.
"""
