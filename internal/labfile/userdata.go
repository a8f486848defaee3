// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"errors"
	"fmt"
	"reflect"
	"strings"

	"github.com/labfile/lab/internal/guest"
)

// userData is a text for cloud-init. What cloud-init could not read is refused.
type userData struct{ text }

// flaws are what is wrong with a text, by places in it.
type flaws []flaw

func (f flaws) Error() string {
	var messages []string
	for _, each := range f {
		messages = append(messages, each.message)
	}
	return strings.Join(messages, "; ")
}

func (u *userData) parse(s string, tag reflect.StructTag) error {
	if err := u.text.parse(s, tag); err != nil {
		return err
	}
	err := guest.CheckUserData(s)
	var bad *guest.UserDataError
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &bad):
		return err
	case bad.YAML == nil:
		return flaws{{offsetOf(s, bad.Line, 1), bad.Message}}
	}
	sub := &report{}
	syntaxProblem(sub, []byte(s), bad.YAML)
	var found flaws
	for _, p := range sub.list {
		found = append(found, flaw{offsetOf(s, p.Line, p.Column), fmt.Sprintf("user data for cloud-init: %s", p.Message)})
	}
	return found
}

// offsetOf returns the byte of s at a line and column, which both begin with 1.
func offsetOf(s string, line, column int) int {
	offset := 0
	for ; line > 1; line-- {
		i := strings.IndexByte(s[offset:], '\n')
		if i < 0 {
			return len(s)
		}
		offset += i + 1
	}
	for i := range s[offset:] {
		if column--; column < 1 {
			return offset + i
		}
	}
	return len(s)
}
