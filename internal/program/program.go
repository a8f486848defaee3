// SPDX-License-Identifier: Apache-2.0

// Package program runs programs of this host that end when lab does.
package program

import (
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
)

// Look finds a program by its name, in PATH and in the folders of root's programs,
// which are not in everybody's PATH. Errors: exec.ErrNotFound.
func Look(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", err
}

// Tie has the kernel send sig to the program that cmd starts when this process ends,
// however it ends (prctl(2), PR_SET_PDEATHSIG). The kernel watches the thread that
// started the program: the caller's goroutine is kept on its thread until it calls
// release, after the program has ended.
func Tie(cmd *exec.Cmd, sig syscall.Signal) (release func()) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = sig
	runtime.LockOSThread()
	return runtime.UnlockOSThread
}

// Run starts a program, which is killed if this process ends, and waits for it, as
// cmd.Run does.
func Run(cmd *exec.Cmd) error {
	defer Tie(cmd, syscall.SIGKILL)()
	return cmd.Run()
}
