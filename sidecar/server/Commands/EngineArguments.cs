using System.CommandLine;
using System.CommandLine.Parsing;
using Rollout.Kernels;
using Rollout.Server.Hosting;

namespace Rollout.Server.Commands;

/// <summary>Options of every command that loads a model.</summary>
internal sealed class EngineArguments
{
    private const int MostThreads = 1024;

    public Option<string?> Model { get; } = Arguments.Folder("--model", "Hugging Face folder: config.json, *.safetensors, tokenizer.json.");

    public Option<int?> Threads { get; } = Arguments.Number("--threads", "Worker threads. Default: one a core.", 1, MostThreads);

    public Option<string?> Device { get; } = Checked(
        "--device", "Device to compute on. auto: the first GPU that can be used, or else the CPU. Default: cpu.", "cpu|cuda[:N]|auto",
        value => value is "cpu" or "cuda" or "auto"
            || (value.StartsWith("cuda:", StringComparison.Ordinal) && byte.TryParse(value.AsSpan(5), out _))
            ? null
            : "'cpu', 'cuda', 'cuda:N' and 'auto' are");

    public Option<string?> DType { get; } = OneOf(
        "--dtype", "How matrices are stored and multiplied. bf16 (default): activations stay fp32. bf16-fast: activations are rounded to "
        + "bf16 too, as GPUs do. int8: half the memory. Both are faster in large batches and move log-probabilities a little. A GPU takes "
        + "bf16 (keys, values and activations too) and fp32.",
        WeightFormats.Names);

    public Option<string?> Tokenizer { get; } = OneOf(
        "--tokenizer", "'bytes' makes every byte of a text a token, instead of the folder's tokenizer.", "bytes");

    public Option<int?> MaxContext { get; } = Arguments.Number(
        "--max-context", "Longest sample in tokens, prompt included. Default: the model's limit.", 1);

    public void AddTo(Command command)
    {
        command.Add(Model);
        command.Add(Threads);
        command.Add(Device);
        command.Add(DType);
        command.Add(Tokenizer);
        command.Add(MaxContext);
    }

    /// <summary>The model to load. Call only where --model was given.</summary>
    public ModelSource Source(ParseResult result)
        => new(
            Path.GetFullPath(result.GetValue(Model)!),
            result.GetValue(Device) ?? "cpu",
            result.GetValue(Threads) ?? 0,
            result.GetValue(DType) is { } name ? WeightFormats.Parse(name) : WeightFormat.BFloat16,
            result.GetValue(Tokenizer));

    private static Option<string?> OneOf(string name, string description, params string[] known)
        => Checked(name, description, string.Join('|', known), value => known.Contains(value)
            ? null
            : $"{string.Join(", ", known.Select(k => $"'{k}'"))} {(known.Length == 1 ? "is" : "are")}");

    /// <param name="name">Name of the option.</param>
    /// <param name="description">Description in the help text.</param>
    /// <param name="values">Values in the help text.</param>
    /// <param name="whatIsKnown">Returns null for a valid value, otherwise the list of valid values.</param>
    private static Option<string?> Checked(string name, string description, string values, Func<string, string?> whatIsKnown)
    {
        Option<string?> option = new(name) { Description = description, HelpName = values };
        option.Validators.Add((OptionResult result) =>
        {
            if (Arguments.Value(result) is { } value && whatIsKnown(value) is { } known)
                result.AddError($"{name}: '{value}' is not known; {known}");
        });
        return option;
    }
}
