// SPDX-License-Identifier: MIT
// Sums over groups that share an item, `share` groups in a row the same one, with the same bits however the work is
// spread: groups go in pieces, each worked on in order. A piece sums up what lies within it. What several pieces share
// lies at their edges, at most two to a piece; their sums are added up afterwards, in order.
#pragma once
#include "math/portable.h"

namespace camk {

struct GroupPieces {
  int64_t groups, each, count;

  // At most `most` pieces.
  static GroupPieces of(int64_t groups, int64_t most) {
    const int64_t wanted = most < 1 ? 1 : most, each = groups > wanted ? (groups + wanted - 1) / wanted : 1;
    return {groups, each, (groups + each - 1) / each};
  }
  CAMK_HD int64_t begin(int64_t piece) const { return piece * each; }
  CAMK_HD int64_t end(int64_t piece) const { return groups < begin(piece + 1) ? groups : begin(piece + 1); }

  // Whether all groups that share an item lie in a piece.
  CAMK_HD bool holds(int64_t piece, int64_t item, int64_t share) const {
    return item * share >= begin(piece) && (item + 1) * share <= end(piece);
  }
  // The number of the edge at which a piece meets an item that it does not hold.
  CAMK_HD int64_t edge(int64_t piece, int64_t item, int64_t share) const {
    return 2 * piece + (item == begin(piece) / share ? 0 : 1);
  }
  // The item that begins in the piece before this one and goes on in it; -1: there is none.
  CAMK_HD int64_t divided(int64_t piece, int64_t share) const {
    const int64_t item = begin(piece) / share, first = item * share;
    return first < begin(piece) && first >= begin(piece - 1) ? item : -1;
  }
  // sum(edge) over the edges of the item that is divided before a piece, in order.
  template <class Sum>
  CAMK_HD void each_edge(int64_t piece, int64_t item, int64_t share, const Sum& sum) const {
    for (int64_t p = piece - 1; p < count && begin(p) < (item + 1) * share; ++p) sum(edge(p, item, share));
  }
};

}  // namespace camk
