// Decides how many draft rows a launch takes. A row's worth is the chance that it turns out right;
// rows are added, best first, while that raises (worth of the launch) / (its seconds).
//
// Chances are estimates, so an account is kept in seconds: what drafts and early logits have added
// to launches, against what the drafts that turned out right have saved. Nothing is spent that the
// account does not hold; all that it is given for nothing is kAllowance of the time that passes,
// which bounds what drafts can ever lose.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "engine/config.h"

namespace effinfer::engine {

class DraftController {
 public:
  explicit DraftController(const Config& config);

  // Something to begin with, for drafts to show what they are worth.
  void grant() { account_ = std::max(account_, kGrant * plain_seconds_); }

  // Chances, learnt from every prediction whether or not its rows ever ran.
  double acceptance() const { return acceptance_.value; }
  void predicted(bool right) { acceptance_.learn(right); }
  void offered_exit(bool exited) { exits_.learn(exited); }
  // The same of what was said after `depth` loops: `again` after an earlier loop had said it.
  double acceptance(int depth, bool again) const { return chance_[2 * depth + again].value; }
  void predicted(int depth, bool again, bool right) { chance_[2 * depth + again].learn(right); }
  // Whether a draft stood when logits after `depth` loops were held against it.
  void rechecked(int depth, bool stood) { changes_[depth].learn(!stood); }
  // Whether that is worth its logits, of one row among `rows`.
  bool rechecks(int depth, int rows) const;

  // The launch took `rows` rows and the logits of `wanted`, where without drafts there would have
  // been `plain_rows` and `plain_wanted`.
  void launched(int rows, int plain_rows, int wanted, int plain_wanted);
  // So many of a row's loops, run as drafts, turned out right.
  void saved(int row_loops) { account_ += row_loops * row_seconds_; }

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
  bool probes() { return ++positions_ % kProbe == 0 && account_ >= 0; }

 private:
  static constexpr int kLevels = 32;
  static constexpr int kProbe = 64;
  static constexpr double kGain = 1.02;  // drafts must promise more than noise
  static constexpr double kAllowance = 0.005;
  static constexpr double kGrant = 3;      // launches
  static constexpr double kMostSaved = 8;  // launches that the account holds: loads change
  // A chance learnt as a moving average, whose first outcomes count for more.
  struct Chance {
    double value;
    int outcomes = 4;  // that the first guess stands for
    void learn(bool outcome) {
      if (outcomes < 64) ++outcomes;
      value += (outcome - value) / outcomes;
    }
  };
  static int level(double worth) { return static_cast<int>(worth * (kLevels - 1)); }
  double seconds(int rows) const { return costs_[rows - 1]; }
  double head_seconds(int rows) const;

  int loops_, max_rows_;
  std::vector<double> costs_, head_costs_;
  Chance acceptance_{0.8}, exits_{0.5};
  std::vector<Chance> chance_, changes_;  // by loops
  double account_ = 0;                    // seconds
  double plain_seconds_;                  // of the last launch, had it no drafts
  double row_seconds_ = 0;                // a row's share of the last launch without drafts
  int rows_ = 0;
  int offers_[kLevels] = {};
  double worth_[kLevels] = {};
  int cut_ = kLevels, at_cut_ = 0;
  int64_t positions_ = 0;
};

}  // namespace effinfer::engine
