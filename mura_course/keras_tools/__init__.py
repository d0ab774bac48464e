"""The Keras half of the book (KL): backbones, models, training. The only room that imports Keras.

It stands on the rooms `data` and `runs` and on the foundation; chapters 5 and 6 explain it.
"""
