using System.CommandLine;
using System.CommandLine.Parsing;
using System.Globalization;

namespace Rollout.Server.Commands;

/// <summary>Options that several commands use. Each reports the errors of its value, and the parser collects them.</summary>
internal static class Arguments
{
    public static Option<int?> Number(string name, string description, int least, int most = int.MaxValue)
    {
        Option<int?> option = new(name) { Description = description, HelpName = "N" };
        option.CustomParser = result =>
        {
            if (int.TryParse(result.Tokens[0].Value, NumberStyles.AllowLeadingSign, CultureInfo.InvariantCulture, out int value)
                && value >= least && value <= most)
            {
                return value;
            }

            string range = most == int.MaxValue ? $"at least {least}" : $"from {least} to {most}";
            result.AddError($"{name}: '{result.Tokens[0].Value}' is not a whole number {range}");
            return null;
        };
        return option;
    }

    public static Option<float?> Real(string name, string description)
    {
        Option<float?> option = new(name) { Description = description, HelpName = "X" };
        option.CustomParser = result =>
        {
            if (TryReal(result.Tokens[0].Value, out float value)) return value;
            result.AddError($"{name}: '{result.Tokens[0].Value}' is not a number");
            return null;
        };
        return option;
    }

    public static Option<uint[]> Ids(string name, string description)
    {
        Option<uint[]> option = new(name) { Description = description, HelpName = "5,6,7" };
        option.CustomParser = result =>
        {
            List<uint> ids = [];
            foreach (string part in result.Tokens.SelectMany(token => token.Value.Split(',')))
            {
                if (uint.TryParse(part.Trim(), NumberStyles.None, CultureInfo.InvariantCulture, out uint id)) ids.Add(id);
                else result.AddError($"{name}: '{part}' is not a token id; write 5,6,7");
            }

            return [.. ids];
        };
        return option;
    }

    public static Option<MemoryShare?> Memory(string name, string description)
    {
        Option<MemoryShare?> option = new(name) { Description = description, HelpName = "SIZE" };
        option.CustomParser = result =>
        {
            if (MemoryShare.TryParse(result.Tokens[0].Value, out MemoryShare share)) return share;
            result.AddError($"{name}: '{result.Tokens[0].Value}' is not a size; write 512MiB, 2GB, a number of bytes or 40%");
            return null;
        };
        return option;
    }

    /// <summary>ID=VALUE pairs; -inf forbids a token.</summary>
    public static Option<Dictionary<uint, float>> Biases(string name, string description)
    {
        Option<Dictionary<uint, float>> option = new(name)
        {
            Description = description,
            HelpName = "ID=BIAS",
            Arity = ArgumentArity.OneOrMore,
            AllowMultipleArgumentsPerToken = false,
        };
        option.CustomParser = result =>
        {
            Dictionary<uint, float> biases = [];
            foreach (string pair in result.Tokens.SelectMany(token => token.Value.Split(',')))
            {
                string[] parts = pair.Split('=');
                if (parts.Length != 2 || !uint.TryParse(parts[0], NumberStyles.None, CultureInfo.InvariantCulture, out uint id)
                    || !TryReal(parts[1], out float bias))
                {
                    result.AddError($"{name}: '{pair}' is not ID=BIAS; write 5=-1.5, or 5=-inf to forbid a token");
                }
                else if (!biases.TryAdd(id, bias))
                {
                    result.AddError($"{name}: token {id} is given twice");
                }
            }

            return biases;
        };
        return option;
    }

    /// <summary>An existing folder.</summary>
    public static Option<string?> Folder(string name, string description)
    {
        Option<string?> option = new(name) { Description = description, HelpName = "DIR" };
        option.Validators.Add(result =>
        {
            string? folder = Value(result);
            if (folder is not null && !Directory.Exists(folder)) result.AddError($"{name}: there is no folder '{folder}'");
        });
        return option;
    }

    /// <summary>The text given, where an option takes one; null when it is absent.</summary>
    public static string? Value(OptionResult result) => result.Tokens.Count == 0 ? null : result.Tokens[^1].Value;

    private static bool TryReal(string text, out float value)
    {
        (bool known, value) = text switch
        {
            "inf" or "+inf" => (true, float.PositiveInfinity),
            "-inf" => (true, float.NegativeInfinity),
            _ => (false, 0),
        };
        return known || float.TryParse(text, NumberStyles.Float, CultureInfo.InvariantCulture, out value);
    }
}
