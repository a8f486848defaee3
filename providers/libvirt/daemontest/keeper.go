// SPDX-License-Identifier: Apache-2.0

package daemontest

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// keep is the main function of the keeper: the parent of the daemon and of all that
// loses its parent below it. It collects who ends at once, which a host's own init
// may be slow to do, starts a daemon for each line that it reads, and at the end of
// its input ends them all and itself.
func keep() {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fatal("becoming the parent of orphans", err)
	}
	system := os.Getenv(keeperVariable) == "system"
	if system {
		if err := isolate(os.Getenv("HOME")); err != nil {
			fatal("leaving the host alone", err)
		}
	}
	program := find("libvirtd")
	children := make(chan struct{}, 1)
	go collect(children)
	run := func(program string, args ...string) int {
		p, err := os.StartProcess(program, append([]string{program}, args...), &os.ProcAttr{Dir: "/", Files: []*os.File{nil, os.Stderr, os.Stderr}})
		if err != nil {
			fatal("starting a daemon", err)
		}
		select {
		case children <- struct{}{}:
		default:
		}
		return p.Pid
	}
	if system {
		run(find("virtlogd")) // libvirtd starts it for a session only
		if conf := os.Getenv(sshdVariable); conf != "" {
			if err := loopbackUp(); err != nil {
				fatal("bringing loopback up", err)
			}
			run(find("sshd"), "-D", "-e", "-f", conf)
		}
	}
	orders := bufio.NewScanner(os.Stdin)
	for orders.Scan() {
		fmt.Println(run(program, strings.Fields(os.Getenv(argumentsVariable))...))
	}
	for {
		alive := offspring()
		if len(alive) == 0 {
			os.Exit(0)
		}
		for _, pid := range alive {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// find returns the path of a daemon's program: administrators' directories are not in
// every user's PATH.
func find(program string) string {
	if path, err := exec.LookPath(program); err == nil {
		return path
	}
	return filepath.Join("/usr/sbin", program)
}

// collect waits for children; woken when there are some again.
func collect(children <-chan struct{}) {
	for {
		_, err := syscall.Wait4(-1, nil, 0, nil)
		if err == syscall.ECHILD {
			<-children
		}
	}
}

var listing sync.Mutex

// offspring lists the children of this process.
func offspring() []int {
	listing.Lock()
	defer listing.Unlock()
	lists, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		return nil
	}
	var pids []int
	for _, list := range lists {
		b, err := os.ReadFile(list)
		if err != nil {
			continue
		}
		for word := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(word); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}
