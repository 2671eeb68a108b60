#!/bin/sh
# The tagged text of a TED release of IWSLT (2014, 2015), unpacked, as plain text, a sentence a line.
#
#     configs/translation/iwslt_text.sh FOLDER SOURCE TARGET OUT
#
# writes OUT/train.SOURCE and .TARGET, OUT/valid.* (dev2010) and OUT/test.* (tst2010 to tst2013, those
# that the release has). A line stays a line, empty ones too: the two languages go together by it.
set -eu
folder=$1 source=$2 target=$3 out=$4
mkdir -p "$out"
pair="$source-$target"
# Titles, speakers and the like are lines of their own.
tags='url|title|description|keywords|talkid|speaker|reviewer|translator|transcript|doc'
for language in "$source" "$target"; do
    sed -E "/^<\/?($tags)[ >]/d; s/^ +//; s/ +\$//" "$folder/train.tags.$pair.$language" \
        > "$out/train.$language"
    for part in valid:dev2010 test:tst201[0-3]; do
        # A name that matches no file is an error of sed.
        sed -E -n '/^ *<seg /{s/^ *<seg [^>]*> *//; s/ *<\/seg> *$//; p;}' \
            "$folder"/IWSLT*.TED.${part#*:}."$pair.$language".xml > "$out/${part%%:*}.$language"
    done
done
