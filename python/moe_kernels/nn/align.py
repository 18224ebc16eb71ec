"""Matching the neurons of two layers: :func:`match_neurons`."""

import numpy as np
import torch
from torch import Tensor


def match_neurons(leader: Tensor, member: Tensor) -> Tensor:
    """The order of ``member``'s neurons in which their products with ``leader``'s add up to the most.

    Args:
        leader, member: [num_neurons, size] float64 on the CPU, the weights of each neuron.

    Returns:
        [num_neurons] int64: position i takes ``member[order[i]]``. Exact; ties as the algorithm finds them.

    Source: Kuhn's assignment problem by shortest augmenting paths (Jonker and Volgenant, 1987), O(num_neurons³).
    """
    cost = -(leader @ member.T).numpy()
    size = cost.shape[0]
    row_price, column_price = np.zeros(size + 1), np.zeros(size + 1)
    row_of = np.full(size + 1, -1)  # column -> row; the last column is where a path starts
    for row in range(size):
        row_of[size] = row
        column = size
        distance = np.full(size, np.inf)
        previous = np.full(size, size)
        done = np.zeros(size + 1, dtype=bool)
        while row_of[column] >= 0:
            done[column] = True
            current = row_of[column]
            reach = cost[current] - row_price[current] - column_price[:size]
            nearer = ~done[:size] & (reach < distance)
            distance[nearer], previous[nearer] = reach[nearer], column
            nearest = int(np.where(done[:size], np.inf, distance).argmin())
            step = distance[nearest]
            reached = np.flatnonzero(done)
            row_price[row_of[reached]] += step
            column_price[reached] -= step
            distance[~done[:size]] -= step
            column = nearest
        while column != size:
            row_of[column] = row_of[previous[column]]
            column = int(previous[column])
    order = np.empty(size, dtype=np.int64)
    order[row_of[:size]] = np.arange(size)
    return torch.from_numpy(order)
