// Decides how many draft rows a launch takes. A row's worth is the chance that it turns out right;
// rows are added, best first, while that raises (worth of the launch) / (its seconds).
#pragma once
#include <cstdint>
#include <vector>

#include "engine/config.h"

namespace effinfer::engine {

class DraftController {
 public:
  explicit DraftController(const Config& config);

  // Chances, learnt from every prediction whether or not its rows ever ran.
  double acceptance() const { return acceptance_; }
  void predicted(bool right);
  void offered_exit(bool exited);

  // A launch of `rows` certain rows. offer() every draft row's chance, then choose(), then take()
  // each: true when it goes aboard.
  void begin(int rows);
  void offer(double worth);
  void choose(int room);
  bool take(double worth);

  // Whether early logits of `decoding` of `rows` rows are worth their cost: what they may predict,
  // against the time of a head that `full` does not run.
  bool asks_early(int rows, int decoding) const;
  // Every so often a position is asked all the same, or nothing would be learnt any more.
  bool probes() { return ++positions_ % kProbe == 0; }

 private:
  static constexpr int kLevels = 32;
  static constexpr int kProbe = 64;
  static constexpr double kGain = 1.02;     // drafts must promise more than noise
  static constexpr double kRate = 1. / 64;  // of the moving averages
  static int level(double worth) { return static_cast<int>(worth * (kLevels - 1)); }
  double seconds(int rows) const { return costs_[rows - 1]; }
  double head_seconds(int rows) const;

  int loops_, max_rows_;
  std::vector<double> costs_, head_costs_;
  double acceptance_ = 0.8, exits_ = 0.5;
  int rows_ = 0;
  int offers_[kLevels] = {};
  double worth_[kLevels] = {};
  int cut_ = kLevels, at_cut_ = 0;
  int64_t positions_ = 0;
};

}  // namespace effinfer::engine
