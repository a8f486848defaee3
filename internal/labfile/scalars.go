// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"errors"
	"fmt"
	"math/big"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// text is any scalar, taken as it is written: a machine called "on" is no
// boolean, and neither is the command "true". The tag form names a stricter
// form: "label", "user", "path" (absolute, of the guest), "owner" or "mode". The tag
// oneof lists the words that it can be.
type text struct {
	place
	value string
}

var userName = regexp.MustCompile(`^[a-z_][a-z0-9_.-]{0,31}$`)

func (t *text) parse(s string, tag reflect.StructTag) error {
	if words := strings.Fields(tag.Get("oneof")); len(words) > 0 && s != "" && !slices.Contains(words, s) {
		return fmt.Errorf("%q is not one of %s%s", shorten(s), strings.Join(words, ", "), didYouMean(s, words, ""))
	}
	switch form := tag.Get("form"); {
	case s == "":
		return errors.New("the value is empty")
	case form == "label" && !lab.ValidLabel(s):
		return fmt.Errorf("%q is not a name; %s", shorten(s), labelRule)
	case form == "user" && !userName.MatchString(s):
		return fmt.Errorf("%q is not a user name", shorten(s))
	case form == "path":
		if err := guestPath(s); err != nil {
			return err
		}
	case form == "owner" && !ownerForm.MatchString(s):
		return fmt.Errorf("%q is not an owner; write user:group, user, or numbers", shorten(s))
	case form == "mode":
		mode, err := parseMode(s)
		if err != nil {
			return err
		}
		s = mode
	}
	t.value = s
	return nil
}

// parseMode returns permissions as four octal digits. They are written in octal: 644,
// 0644 and 0o644 are the same.
func parseMode(s string) (string, error) {
	if !modeForm.MatchString(s) {
		return "", fmt.Errorf("%q is not a mode; write it in octal, such as 0644", shorten(s))
	}
	digits := strings.TrimLeft(s, "0o")
	return strings.Repeat("0", 4-len(digits)) + digits, nil
}

var (
	ownerForm = regexp.MustCompile(`^([a-z_][a-z0-9_.-]{0,31}|[0-9]{1,10})(:([a-z_][a-z0-9_.-]{0,31}|[0-9]{1,10}))?$`)
	modeForm  = regexp.MustCompile(`^(0o?)?[0-7]{3,4}$`)
)

// anyText is a text that may be empty.
type anyText struct {
	place
	value string
}

func (t *anyText) parse(s string, _ reflect.StructTag) error {
	t.value = s
	return nil
}

// skip says that something is left out: true or false, or the reason why.
type skip struct {
	place
	value string // the reason; empty if nothing is skipped
}

func (k *skip) parse(s string, _ reflect.StructTag) error {
	switch strings.ToLower(s) {
	case "":
		return errors.New("the value is empty")
	case "false":
	case "true":
		k.value = "skip: true"
	case "yes", "on", "y", "no", "off", "n":
		return fmt.Errorf("%q is neither true or false nor a reason; write true, false, or why it is skipped", s)
	default:
		k.value = s
	}
	return nil
}

// boolean is true or false.
type boolean struct {
	place
	value bool
}

func (b *boolean) parse(s string, _ reflect.StructTag) error {
	switch s {
	case "true":
		b.value = true
	case "false":
	case "yes", "on", "y":
		return fmt.Errorf("%q is not true or false; write true", s)
	case "no", "off", "n":
		return fmt.Errorf("%q is not true or false; write false", s)
	default:
		return fmt.Errorf("%q is not true or false", shorten(s))
	}
	return nil
}

const labelRule = "use up to 63 lower-case letters, digits and hyphens, beginning and ending with a letter or digit"

// integer is a whole number within the range of its tag.
type integer struct {
	place
	value int
}

func (i *integer) parse(s string, tag reflect.StructTag) error {
	v, err := strconv.Atoi(s)
	if errors.Is(err, strconv.ErrSyntax) {
		return fmt.Errorf("%q is not a whole number", shorten(s))
	}
	least, most := integerRange(tag)
	if err != nil || v < least || v > most {
		return fmt.Errorf("%s is not between %d and %d", shorten(s), least, most)
	}
	i.value = v
	return nil
}

func integerRange(tag reflect.StructTag) (least, most int) {
	lo, hi, _ := strings.Cut(tag.Get("range"), "..")
	least, _ = strconv.Atoi(lo)
	most, _ = strconv.Atoi(hi)
	return least, most
}

// size is a number of bytes with a binary unit.
type size struct {
	place
	value lab.Bytes
}

var sizeForm = regexp.MustCompile(`^([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([A-Za-z]*)$`)

func (z *size) parse(s string, tag reflect.StructTag) error {
	v, err := parseSize(s)
	if err != nil {
		return err
	}
	lo, hi, _ := strings.Cut(tag.Get("range"), "..")
	least, _ := parseSize(lo)
	most, _ := parseSize(hi)
	switch {
	case v < least || v > most:
		return fmt.Errorf("%s is not between %s and %s", s, least, most)
	case v%lab.MiB != 0:
		return fmt.Errorf("%s is not a whole number of MiB", s)
	}
	z.value = v
	return nil
}

// parseSize reads a size such as "512MiB", "1.5GiB" or "2G". K, M, G and T
// are binary too, as they are in most tools that run virtual machines.
func parseSize(s string) (lab.Bytes, error) {
	m := sizeForm.FindStringSubmatch(s)
	if m == nil {
		return 0, fmt.Errorf("%q is not a size; write a number and a unit, such as 512MiB or 2GiB", shorten(s))
	}
	var unit lab.Bytes
	switch m[2] {
	case "KiB", "K":
		unit = lab.KiB
	case "MiB", "M":
		unit = lab.MiB
	case "GiB", "G":
		unit = lab.GiB
	case "TiB", "T":
		unit = lab.TiB
	case "":
		return 0, fmt.Errorf("%s has no unit; write %sMiB or %sGiB", s, s, s)
	default:
		for _, u := range []string{"KiB", "MiB", "GiB", "TiB"} {
			if strings.EqualFold(m[2][:1], u[:1]) {
				return 0, fmt.Errorf("%q is not a unit; write %s%s", m[2], m[1], u)
			}
		}
		return 0, fmt.Errorf("%q is not a unit; use KiB, MiB, GiB or TiB", m[2])
	}
	v, _ := new(big.Rat).SetString(m[1])
	v.Mul(v, new(big.Rat).SetInt64(int64(unit)))
	if !v.IsInt() {
		return 0, fmt.Errorf("%s is not a whole number of bytes", s)
	}
	// Nine digits of the greatest unit exceed int64; ranges are far below that.
	if !v.Num().IsInt64() {
		return 0, fmt.Errorf("%s is too much", s)
	}
	return lab.Bytes(v.Num().Int64()), nil
}

// duration is a length of time in Go's notation, without days.
type duration struct {
	place
	value time.Duration
}

func (t *duration) parse(s string, tag reflect.StructTag) error {
	v, err := time.ParseDuration(s)
	if err != nil {
		if _, err := strconv.ParseFloat(s, 64); err == nil {
			return fmt.Errorf("%s has no unit; write %ss", shorten(s), shorten(s))
		}
		if days, err := strconv.Atoi(strings.TrimSuffix(s, "d")); err == nil && days > 0 && days < 10000 {
			return fmt.Errorf("days are written in hours; write %dh", 24*days)
		}
		return fmt.Errorf("%q is not a duration; write 30s, 2m or 1m30s", shorten(s))
	}
	lo, hi, _ := strings.Cut(tag.Get("range"), "..")
	least, _ := time.ParseDuration(lo)
	most, _ := time.ParseDuration(hi)
	if v < least || v > most {
		return fmt.Errorf("%s is not between %s and %s", s, lo, hi)
	}
	t.value = v
	return nil
}
