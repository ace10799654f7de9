// Whether drafts pay, by the clock: launches with drafts against launches without, at each load.
// Cost tables and chances say which drafts are the best; whether any are worth their time depends
// on more than that (the policy, the caches, the text), and shows in work a second.
#pragma once
#include <cstdint>

namespace effinfer::engine {

class DraftTrials {
 public:
  explicit DraftTrials(int loops) : loops_(loops) {}

  // For a launch with so many requests past their prompts: whether it may have drafts.
  bool drafts(int decoding) {
    load_ = &loads_[level(decoding)];
    return load_->way == kDrafts;
  }
  // Whether drafts begin to be tried with this launch.
  bool begins() const { return load_->way == kDrafts && load_->launches == 0 && load_->begins; }

  // Whether launches have just gone back to plain ones: drafts have brought requests out of step,
  // whose logits shared launches.
  bool realigns() const { return load_->way == kPlain && load_->launches < kSettling * loops_; }

  // The launch took so many seconds and brought that many certain loops of rows: those it ran, and
  // drafts' that ran before and are now known to be right. Of launches that also read prompts,
  // which take long for other reasons, nothing is learnt.
  void ran(double seconds, int loops, bool prompts);

 private:
  enum Way : int8_t { kPlain, kDrafts };
  // Launches of an epoch, in loops: those at its start that still hold work of the other way, and
  // those that are timed at least; and their seconds, so that an interruption is no verdict.
  static constexpr int kSettling = 2, kTimed = 6;
  static constexpr double kLeastTimed = 0.02;
  // Epochs from one trial of the slower way to the next; twice as many after each that it lost.
  static constexpr int kWait = 32, kMostWait = 4096;
  static constexpr double kGain = 1.05;      // more than noise, and than prompts out of step cost
  static constexpr double kInterrupted = 4;  // times what a launch takes
  static constexpr int kLevels = 8;

  struct Load {
    Way way = kDrafts, better = kDrafts;
    double rate[2] = {};  // loops of rows a second; 0: never timed
    int launches = 0;     // of this epoch
    int64_t loops = 0;
    double seconds = 0;
    double typical = 0;          // seconds of a launch
    int left = 1, wait = kWait;  // epochs
    bool begins = true;          // a trial of drafts, with this epoch
  };

  static int level(int decoding) {
    int level = 0;
    while (decoding > 1 && level < kLevels - 1) decoding /= 2, ++level;
    return level;
  }
  void end_epoch(Load& load);

  int loops_;
  Load loads_[kLevels];
  Load* load_ = loads_;
};

}  // namespace effinfer::engine
