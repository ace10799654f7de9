#include "engine/draft_controller.h"

#include <algorithm>

namespace effinfer::engine {

DraftController::DraftController(const Config& config)
    : loops_(config.loops),
      max_rows_(config.max_rows),
      costs_(config.costs),
      head_costs_(config.head_costs),
      chance_(2 * config.loops, Chance{0.8}),
      changes_(config.loops, Chance{0.2}),
      plain_seconds_(config.costs.empty() ? 0 : config.costs[0]) {
  // Measured times are noisy; more rows never really take less.
  for (size_t n = 1; n < costs_.size(); ++n) costs_[n] = std::max(costs_[n], costs_[n - 1]);
}

void DraftController::launched(int rows, int plain_rows, int wanted, int plain_wanted) {
  if (plain_rows == 0) return;
  const double plain = seconds(plain_rows) + head_seconds(plain_wanted);
  plain_seconds_ = plain;
  row_seconds_ = plain / plain_rows;
  account_ += kAllowance * plain - (seconds(rows) + head_seconds(wanted) - plain);
  account_ = std::min(account_, kMostSaved * plain);
}

void DraftController::begin(int rows) {
  rows_ = rows;
  std::fill_n(offers_, kLevels, 0);
  std::fill_n(worth_, kLevels, 0.);
}

void DraftController::offer(double worth) {
  ++offers_[level(worth)];
  worth_[level(worth)] += worth;
}

void DraftController::choose(int room) {
  cut_ = kLevels;
  at_cut_ = 0;
  if (rows_ == 0) return;
  double best = rows_ / seconds(rows_) * kGain;
  double worth = rows_;
  int rows = rows_;
  for (int l = kLevels - 1; l >= 0; --l)
    for (int n = 1; n <= offers_[l] && rows - rows_ < room; ++n) {
      worth += worth_[l] / offers_[l];
      const double rate = worth / seconds(++rows);
      if (rate <= best || seconds(rows) - seconds(rows_) > std::max(account_, 0.)) continue;
      best = rate;
      cut_ = l;
      at_cut_ = n;
    }
}

bool DraftController::take(double worth) {
  return level(worth) > cut_ || (level(worth) == cut_ && at_cut_-- > 0);
}

double DraftController::head_seconds(int rows) const {
  return head_costs_.empty() || rows == 0 ? 0 : head_costs_[std::min(rows, max_rows_) - 1];
}

bool DraftController::rechecks(int depth, int rows) const {
  // A draft that changes spares a row in each of the loops left; the launch has a head anyway.
  const double head = (head_seconds(2 * rows) - head_seconds(rows)) / rows;
  return changes_[depth].value * (loops_ - depth) * row_seconds_ > head;
}

bool DraftController::asks_early(int rows, int decoding) const {
  if (decoding == 0) return false;
  const double plain = rows / seconds(rows);
  double best = plain, worth = rows, chance = 1;
  int n = rows;
  for (int ahead = 1; ahead < loops_; ++ahead) {
    chance *= acceptance_.value;
    for (int i = 0; i < decoding && n < max_rows_; ++i) {
      worth += chance;
      best = std::max(best, worth / seconds(++n));
    }
  }
  const double gain = exits_.value * (best / plain - 1);
  const double cost = head_seconds(decoding);
  return best > plain * kGain && gain * seconds(rows) > cost && cost <= std::max(account_, 0.);
}

}  // namespace effinfer::engine
