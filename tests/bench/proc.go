package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// What Linux tells of a process and of those that it started, in /proc; see proc(5). Elsewhere these
// fail, and what is made of them is not measured.

// tick is the unit of a process's times: USER_HZ is 100 wherever Linux runs.
const tick = time.Second / 100

type stat struct {
	parent  int
	cpu     time.Duration // its own, and that of its children which have ended and been waited for
	threads float64
}

func statOf(pid string) (s stat, err error) {
	b, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return s, err
	}
	// The second field is the program's name in parentheses, with what it likes in it.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 18 {
		return s, fmt.Errorf("/proc/%s/stat: %q", pid, b)
	}
	if s.parent, err = strconv.Atoi(fields[1]); err != nil {
		return s, err
	}
	for _, f := range fields[11:15] { // utime, stime, and both of the children
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return s, err
		}
		s.cpu += time.Duration(n) * tick
	}
	s.threads, err = strconv.ParseFloat(fields[17], 64)
	return s, err
}

// family gives a process and all that descend from it now. It looks until it has seen the same ones
// twice: between looking at a parent and at its child, the one may have taken the other's time over.
func family(pid int) (map[int]stat, error) {
	same := func(a, b stat) bool { return true }
	var last map[int]stat
	for {
		ours, err := descent(pid)
		if err != nil || maps.EqualFunc(last, ours, same) {
			return ours, err
		}
		last = ours
	}
}

func descent(pid int) (map[int]stat, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	all := map[int]stat{}
	for _, dir := range dirs {
		name := filepath.Base(dir)
		s, err := statOf(name)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
			continue // it ended meanwhile
		} else if err != nil {
			return nil, err
		}
		id, err := strconv.Atoi(name)
		if err != nil {
			return nil, err
		}
		all[id] = s
	}
	if _, ok := all[pid]; !ok {
		return nil, fmt.Errorf("process %d: %w", pid, os.ErrNotExist)
	}
	ours := map[int]stat{pid: all[pid]}
	for grown := true; grown; {
		grown = false
		for id, s := range all {
			_, parent := ours[s.parent]
			if _, known := ours[id]; parent && !known {
				ours[id], grown = s, true
			}
		}
	}
	return ours, nil
}

// cpuTime is what a process and its descendants have spent, user and system.
func cpuTime(pid int) (total time.Duration, err error) {
	ours, err := family(pid)
	for _, s := range ours {
		total += s.cpu
	}
	return total, err
}

// memory is what a process and its descendants hold, in bytes: what several processes share is
// divided among them (PSS), so that a program which forks is not counted for its code again and
// again.
func memory(pid int) (bytes, threads float64, err error) {
	ours, err := family(pid)
	if err != nil {
		return 0, 0, err
	}
	for id, s := range ours {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", id))
		if err != nil && id != pid {
			continue // it ended meanwhile
		} else if err != nil {
			return 0, 0, err
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "Pss:" {
				kib, err := strconv.ParseFloat(f[1], 64)
				if err != nil {
					return 0, 0, err
				}
				bytes += kib * 1024
			}
		}
		threads += s.threads
	}
	return bytes, threads, nil
}
