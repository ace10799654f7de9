#include "engine/draft_trials.h"

#include <algorithm>
#include <utility>

namespace effinfer::engine {

void DraftTrials::ran(double seconds, int loops, bool prompts) {
  Load& load = *load_;
  load.begins = false;
  if (seconds <= 0) return;  // no clock, no trials
  if (load.launches < kSettling * loops_) {
    ++load.launches;
    return;
  }
  if (prompts) return;
  ++load.launches;
  // What took far longer was interrupted.
  const double counted =
      load.typical > 0 ? std::min(seconds, kInterrupted * load.typical) : seconds;
  load.typical += (counted - load.typical) / (load.typical > 0 ? 16 : 1);
  load.seconds += counted;
  load.loops += loops;
  if (load.launches < (kSettling + kTimed) * loops_ || load.seconds < kLeastTimed) return;
  end_epoch(load);
  load.launches = 0;
  load.loops = 0;
  load.seconds = 0;
}

void DraftTrials::end_epoch(Load& load) {
  const double rate = static_cast<double>(load.loops) / load.seconds;
  const bool trial = load.way != load.better;
  double& known = load.rate[load.way];
  known = trial || known == 0 ? rate : (known + rate) / 2;
  const bool draft = load.rate[kDrafts] > load.rate[kPlain] * kGain;
  if (trial) {
    const Way before = std::exchange(load.better, draft ? kDrafts : kPlain);
    load.wait = load.better != before ? kWait : std::min(2 * load.wait, kMostWait);
    load.way = load.better;
    load.left = load.wait;
  } else if (--load.left <= 0 || (load.way == kDrafts && !draft)) {
    // What seems to lose may do so because all has become slower: plain launches tell, at once.
    load.way = load.better == kPlain ? kDrafts : kPlain;
    load.begins = load.way == kDrafts;
  }
}

}  // namespace effinfer::engine
