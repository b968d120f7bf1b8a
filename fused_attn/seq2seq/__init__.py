"""Attentional RNN sequence to sequence: model, search, training, and the tasks that come with it.

Import from the modules: ``model`` (`Seq2Seq`), ``search`` (`search`), ``training``
(`Trainer`), ``inference`` (`Predictor`), ``g2p`` (letters to phones). This file imports none of
them, so that the command line can read the defaults in ``config`` without importing torch.
"""
