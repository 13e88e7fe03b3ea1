#include "parser.h"

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "numeric.h"

namespace ptxsim {

std::string trim(const std::string& text) {
    const char* blank = " \t\r\n";
    size_t first = text.find_first_not_of(blank);
    return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(blank) - first + 1);
}

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::string part;
    int depth = 0;
    for (char c : text) {
        if (c == '[' || c == '{' || c == '(') depth++;
        if (c == ']' || c == '}' || c == ')') depth--;
        if (c == separator && depth == 0) {
            parts.push_back(trim(part));
            part.clear();
        } else {
            part += c;
        }
    }
    if (!trim(part).empty()) parts.push_back(trim(part));
    return parts;
}

u64 parse_literal(const std::string& text, Type type) {
    const char* s = text.c_str();
    char* end = nullptr;
    u64 value;
    const bool prefixed = text.size() > 2 && s[0] == '0';
    if (prefixed && (s[1] == 'f' || s[1] == 'F')) {
        value = std::strtoull(s + 2, &end, 16);
        if (type == Type::F64) value = bits<u64>(static_cast<double>(bits<float>(static_cast<u32>(value))));
    } else if (prefixed && (s[1] == 'd' || s[1] == 'D')) {
        value = std::strtoull(s + 2, &end, 16);
        if (type == Type::F32) value = bits<u32>(static_cast<float>(bits<double>(value)));
    } else if (text.find('.') != std::string::npos) {
        double number = std::strtod(s, &end);
        value = type == Type::F64 ? bits<u64>(number) : bits<u32>(static_cast<float>(number));
    } else {
        bool negative = s[0] == '-';
        value = std::strtoull(s + negative, &end, 0);
        if (negative) value = 0 - value;
        while (*end == 'U' || *end == 'L') end++;
    }
    if (end == s || *end) throw Error("not a number: " + text);
    return value;
}

namespace {

std::string without_comments(const std::string& source) {
    std::string text;
    text.reserve(source.size());
    for (size_t i = 0; i < source.size(); i++) {
        if (source.compare(i, 2, "//") == 0) {
            i = source.find('\n', i);
            if (i == std::string::npos) break;
            text += '\n';
        } else if (source.compare(i, 2, "/*") == 0) {
            i = source.find("*/", i);
            if (i == std::string::npos) break;
            i++;
        } else {
            text += source[i];
        }
    }
    return text;
}

bool is_name_char(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}

std::vector<std::string> words_of(const std::string& text) {
    std::vector<std::string> words;
    std::string word;
    for (char c : text) {
        if (std::isspace(static_cast<unsigned char>(c))) {
            if (!word.empty()) words.push_back(word);
            word.clear();
        } else {
            word += c;
        }
    }
    if (!word.empty()) words.push_back(word);
    return words;
}

// `.global .align 4 .b8 name[12] = {…}` and its relatives; one entry per declared name
std::vector<Declaration> parse_declaration(const std::string& text) {
    const size_t equals = text.find('=');
    std::string head = trim(text.substr(0, equals));
    Declaration common;
    bool typed = false, pointer = false;  // `.ptr .global .align 16` describes what a parameter points to
    std::vector<std::string> words = words_of(head);
    size_t w = 0;
    for (; w < words.size(); w++) {
        const std::string& word = words[w];
        if (std::isdigit(static_cast<unsigned char>(word[0]))) continue;  // the number of .align
        if (word[0] != '.') break;
        std::string name = word.substr(1);
        if (name == "align" && pointer)
            continue;
        else if (name == "align")
            common.align = static_cast<u32>(std::atoi(words.at(w + 1).c_str()));
        else if (name == "reg")
            common.is_register = true;
        else if (name == "global")
            common.space = typed ? common.space : Space::Global;
        else if (name == "const")
            common.space = Space::Const;
        else if (name == "local")
            common.space = Space::Local;
        else if (name == "shared")
            common.space = typed ? common.space : Space::Shared;
        else if (name == "param")
            common.space = Space::Param;
        else if (auto type = type_from(name))
            common.type = *type, typed = true;
        else if (name == "ptr")
            pointer = true;
        else if (name != "extern" && name != "visible" && name != "weak" && name != "common" &&
                 name != "attribute")
            throw Error("unknown declaration: " + text);
    }
    std::string names;
    for (; w < words.size(); w++) names += words[w] + " ";
    std::vector<Declaration> declared;
    for (const std::string& one : split(names, ',')) {
        Declaration d = common;
        const size_t bracket = one.find_first_of("[<");
        d.name = trim(one.substr(0, bracket));
        if (bracket != std::string::npos && one[bracket] == '<')
            d.count = std::atoi(one.c_str() + bracket + 1);
        if (bracket != std::string::npos && one[bracket] == '[') {
            d.unsized = trim(one.substr(bracket + 1, one.find(']') - bracket - 1)).empty();
            for (size_t b = bracket; b != std::string::npos; b = one.find('[', b + 1))
                d.elements *= d.unsized ? 0 : std::strtoull(one.c_str() + b + 1, nullptr, 0);
        }
        declared.push_back(d);
    }
    if (equals != std::string::npos) {
        Declaration& d = declared.at(0);
        std::string values = trim(text.substr(equals + 1));
        if (!values.empty() && values[0] == '{') values = values.substr(1, values.rfind('}') - 1);
        d.initial.assign(d.size(), 0);
        size_t at = 0;
        for (const std::string& value : split(values, ',')) {
            u64 raw = parse_literal(value, d.type);
            if (at + bytes_of(d.type) > d.initial.size()) throw Error("too many initialisers: " + d.name);
            std::memcpy(&d.initial[at], &raw, bytes_of(d.type));
            at += bytes_of(d.type);
        }
    }
    return declared;
}

Statement parse_statement(const std::string& text, Position at) {
    Statement s;
    s.at = at;
    std::string rest = text;
    for (char& c : rest)
        if (c == '\n' || c == '\t' || c == '\r') c = ' ';
    s.text = rest;
    if (rest[0] == '@') {
        size_t end = rest.find(' ');
        std::string guard = rest.substr(1, end - 1);
        s.guard_negated = guard[0] == '!';
        s.guard = guard.substr(s.guard_negated);
        rest = trim(rest.substr(end));
    }
    size_t end = rest.find(' ');
    std::vector<std::string> words = split(rest.substr(0, end), '.');
    s.opcode = words.at(0);
    s.modifiers.assign(words.begin() + 1, words.end());
    if (end != std::string::npos) s.operands = split(rest.substr(end), ',');
    return s;
}

class BodyParser {
  public:
    BodyParser(const std::string& text, Function& function) : text_(text), function_(function) {}

    void run() {
        for (size_t i = 0; i < text_.size(); i++) {
            const char c = text_[i];
            const bool fresh = trim(current_).empty();
            if (fresh && c == '.' && line_directive(i)) continue;
            if (fresh && (c == '{' || c == '}')) {
                if (c == '{')
                    function_.body.push_back(ScopeOpen{});
                else
                    function_.body.push_back(ScopeClose{});
                current_.clear();
            } else if (c == ';') {
                statement(trim(current_));
                current_.clear();
            } else if (c == ':' && text_[i + 1] != ':' && text_[i - 1] != ':' && label(trim(current_))) {
                current_.clear();
            } else {
                current_ += c;
            }
        }
    }

  private:
    // .loc and .pragma end with their line; returns whether it was one, and moves i there
    bool line_directive(size_t& i) {
        if (text_.compare(i, 4, ".loc") == 0 && !is_name_char(text_[i + 4])) {  // not .local
            int file = 0, line = 0;
            if (std::sscanf(text_.c_str() + i + 4, " %d %d", &file, &line) == 2) at_ = {file, line};
        } else if (text_.compare(i, 5, ".file") != 0 && text_.compare(i, 7, ".pragma") != 0) {
            return false;
        }
        i = text_.find('\n', i);
        if (i == std::string::npos) i = text_.size();
        return true;
    }

    bool label(const std::string& name) {
        if (name.empty()) return false;
        for (char c : name)
            if (!is_name_char(c)) return false;
        function_.body.push_back(Label{name});
        return true;
    }

    void statement(const std::string& text) {
        if (text.empty()) return;
        if (text.compare(0, 14, ".branchtargets") == 0) {
            function_.body.push_back(
                BranchTargets{std::get<Label>(function_.body.back()).name, split(text.substr(14), ',')});
        } else if (text.compare(0, 14, ".callprototype") == 0) {
            throw Error("indirect calls are not supported");
        } else if (text[0] == '.') {
            for (Declaration& d : parse_declaration(text)) function_.body.push_back(std::move(d));
        } else {
            function_.body.push_back(parse_statement(text, at_));
        }
    }

    const std::string& text_;
    Function& function_;
    std::string current_;
    Position at_;
};

size_t closing(const std::string& text, size_t open, char left, char right) {
    int depth = 0;
    for (size_t i = open; i < text.size(); i++) {
        if (text[i] == left) depth++;
        if (text[i] == right && --depth == 0) return i;
    }
    throw Error(std::string("unbalanced ") + left);
}

// `[.visible] .entry name(params) {…}` or `.func (result) name(params) {…}`; returns the position behind it
size_t parse_function(const std::string& text, size_t at, ModuleText& module) {
    Function function;
    function.is_kernel = text.compare(at, 6, ".entry") == 0;
    size_t i = at + (function.is_kernel ? 6 : 5);
    auto skip = [&] {
        while (std::isspace(static_cast<unsigned char>(text[i]))) i++;
    };
    auto list = [&](std::vector<Declaration>& out) {
        size_t end = closing(text, i, '(', ')');
        for (const std::string& one : split(text.substr(i + 1, end - i - 1), ','))
            for (Declaration& d : parse_declaration(one)) out.push_back(std::move(d));
        i = end + 1;
    };
    skip();
    if (text[i] == '(') list(function.results), skip();
    while (is_name_char(text[i])) function.name += text[i++];
    skip();
    if (text[i] == '(') list(function.parameters);
    size_t next = text.find_first_of("{;", i);
    if (next == std::string::npos) throw Error("no body: " + shortened(function.name, 64));
    if (text[next] == ';') return next + 1;  // a prototype
    size_t end = closing(text, next, '{', '}');
    const std::string body = text.substr(next + 1, end - next - 1) + "\n";
    BodyParser(body, function).run();
    module.functions.push_back(std::move(function));
    return end + 1;
}

}  // namespace

ModuleText parse_module(const std::string& source) {
    ModuleText module;
    const std::string text = without_comments(source);
    size_t i = 0;
    while (i < text.size()) {
        if (std::isspace(static_cast<unsigned char>(text[i]))) {
            i++;
            continue;
        }
        size_t line_end = std::min(text.find('\n', i), text.size());
        auto starts = [&](const char* word) { return text.compare(i, std::strlen(word), word) == 0; };
        if (starts(".file")) {
            int number;
            char name[1024];
            if (std::sscanf(text.c_str() + i, ".file %d \"%1023[^\"]\"", &number, name) == 2) {
                std::string path = name;
                module.files[number] = path.substr(path.rfind('/') + 1);
            }
            i = line_end;
        } else if (starts(".version") || starts(".target") || starts(".address_size") || starts(".pragma")) {
            i = line_end;
        } else if (starts(".section")) {
            i = closing(text, text.find('{', i), '{', '}') + 1;
        } else if (starts(".entry") || starts(".func")) {
            i = parse_function(text, i, module);
        } else if (starts(".visible") || starts(".extern") || starts(".weak")) {
            size_t next = text.find_first_of(" \t\n", i);
            size_t word = text.find_first_not_of(" \t\n", next);
            if (text.compare(word, 6, ".entry") == 0 || text.compare(word, 5, ".func") == 0) {
                i = word;
                continue;
            }
            size_t end = text.find(';', i);
            for (Declaration& d : parse_declaration(text.substr(i, end - i)))
                module.variables.push_back(std::move(d));
            i = end + 1;
        } else if (text[i] == '.') {
            size_t end = text.find(';', i);
            if (end == std::string::npos)
                throw Error("unfinished directive: " + shortened(text.substr(i), 80));
            for (Declaration& d : parse_declaration(text.substr(i, end - i)))
                module.variables.push_back(std::move(d));
            i = end + 1;
        } else {
            throw Error("not PTX: " + shortened(text.substr(i, line_end - i), 80));
        }
    }
    return module;
}

}  // namespace ptxsim
