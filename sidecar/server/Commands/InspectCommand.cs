using System.CommandLine;
using System.Globalization;
using Grpc.Core;
using Grpc.Net.Client;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.V1;
using Spectre.Console;

namespace Rollout.Server.Commands;

/// <summary>`rollout inspect`: what a model folder holds, or what a server is doing.</summary>
internal static class InspectCommand
{
    private const int TensorsListed = 50;

    public static Command Create()
    {
        Option<string?> model = Arguments.Folder("--model", "Hugging Face folder to look into. No weights are loaded.");
        Option<string?> address = new("--address") { Description = "Server to ask: unix:PATH or http://HOST:PORT.", HelpName = "ADDRESS" };
        address.Validators.Add(result =>
        {
            if (Arguments.Value(result) is { } value && RemoteRollouts.FindProblem(value) is { } problem)
                result.AddError($"--address: {problem}");
        });
        Command command = new("inspect", "Facts of a model folder, or the status of a server.") { model, address };
        command.Validators.Add(result =>
        {
            if (result.GetResult(model) is null == result.GetResult(address) is null)
                result.AddError("exactly one of --model and --address must be given");
        });
        command.SetAction(async (result, cancellation) => result.GetValue(address) is { } server
            ? await InspectServerAsync(server, cancellation)
            : InspectFolder(result.GetValue(model)!));
        return command;
    }

    private static int InspectFolder(string folder)
    {
        ModelSpec spec = ModelSpec.Load(folder);
        using Checkpoint checkpoint = Checkpoint.Open(folder);
        LoadPlan plan = LoadPlan.Compile(spec);
        long parameters = plan.Weights.Sum(weight => (long)weight.Outputs * weight.Inputs);

        // As stored by the CPU backend: matrices in bfloat16, vectors and the cache in fp32.
        long weightBytes = plan.Weights.Sum(weight => (long)weight.Outputs * weight.Inputs * (weight.IsVector ? 4 : 2));
        long kvBytes = spec.Layers.Sum(layer => 2L * layer.Attention.KvWidth) * sizeof(float);
        (AttentionSpec attention, GatedMlpSpec mlp, _) = spec.Layers[0];
        string tied = spec.TiedHead ? ", output head tied to the embedding" : "";
        Print(
            ("family", spec.ModelType),
            ("parameters", $"{Digits(parameters)}{tied}"),
            ("layers", $"{spec.Layers.Count}, hidden {spec.HiddenSize}, MLP {mlp.Width}"),
            ("attention", $"{attention.Heads} query heads, {attention.KvHeads} key/value heads of {attention.HeadDim}{Extras(attention)}"),
            ("positions", $"{Digits(spec.MaxPositions)}, {Rope(attention.Rope)}"),
            ("vocabulary", $"{Digits(spec.VocabSize)}, end of sequence {string.Join(", ", spec.EosTokenIds)}"),
            ("tokenizer", File.Exists(Path.Combine(folder, "tokenizer.json")) ? "tokenizer.json" : "none: token ids only"),
            ("stored as", string.Join(", ", checkpoint.Tensors.Values.CountBy(t => t.Info.DTypeName).Select(t => $"{t.Value} {t.Key}"))),
            ("weights in memory", $"{ByteSize.Format(weightBytes)}, twice that once an update has been staged"),
            ("cache per token", $"{ByteSize.Format(kvBytes)}, {ByteSize.Format(kvBytes * spec.MaxPositions)} for a sample of full length"));

        string[] missing = [.. spec.CheckpointTensors().Where(tensor => !checkpoint.Tensors.ContainsKey(tensor.Name)).Select(t => t.Name)];
        string[] unexpected = [.. checkpoint.Tensors.Keys.Where(name => !plan.TryFind(name, out _)).Order()];
        string[] misfits = [.. checkpoint.Tensors.Values.Select(tensor => Misfit(tensor.Info, plan)).OfType<string>().Order()];
        List("missing", missing);
        List("unexpected", unexpected);
        List("of the wrong shape or type", misfits);
        return missing.Length + unexpected.Length + misfits.Length == 0 ? ExitCode.Ok : ExitCode.BadInput;
    }

    private static async Task<int> InspectServerAsync(string address, CancellationToken cancellation)
    {
        using GrpcChannel channel = RemoteRollouts.Open(address);
        CallOptions call = new(deadline: DateTime.UtcNow.AddSeconds(10), cancellationToken: cancellation);
        StatusReply status = await new ControlService.ControlServiceClient(channel).StatusAsync(new StatusRequest(), call);
        string reason = status.Reason.Length > 0 ? $": {status.Reason}" : "";
        string hits = $"{Digits(status.PrefixHitTokens)} from the prefix cache";
        Print(
            ("state", $"{status.State.ToString().ToLowerInvariant()}{reason}"),
            ("model", $"{status.Model}, vocabulary {Digits(status.VocabSize)}, context {Digits(status.MaxContext)}"),
            ("backend", status.Backend),
            ("weights version", $"{status.Version}{(status.Updating ? $", '{status.UpdateOwner}' is updating" : "")}"),
            ("samples", $"{Digits(status.Running)} running, {Digits(status.Waiting)} waiting"),
            ("KV blocks", $"{Digits(status.KvBlocksUsed)} of {Digits(status.KvBlocksTotal)} used, {Digits(status.KvBlocksCached)} cached"),
            ("steps", $"{Digits(status.Steps)}, {Digits(status.Preemptions)} preemptions"),
            ("tokens", $"{Digits(status.GeneratedTokens)} generated, {Digits(status.PrefilledTokens)} prefilled, {hits}"));
        return ExitCode.Ok;
    }

    private static string? Misfit(TensorInfo tensor, LoadPlan plan)
    {
        if (!plan.TryFind(tensor.Name, out LoadEntry? entry)) return null;
        if (!tensor.Shape.SequenceEqual(entry.Shape))
            return $"{tensor.Name}: shape {LoadEntry.Format(tensor.Shape)}, config.json says {LoadEntry.Format(entry.Shape)}";
        return tensor.DType is null ? $"{tensor.Name}: {tensor.DTypeName}; BF16, F16 and F32 are served" : null;
    }

    private static string Extras(AttentionSpec spec)
        => string.Concat(spec.QueryKeyNorm != QueryKeyNorm.None ? ", normalised" : "", spec.QkvBias ? ", biased" : "");

    private static string Rope(RopeSpec rope)
    {
        string scaled = rope.Type == RopeType.Default ? "" : string.Create(CultureInfo.InvariantCulture, $", scaled by {rope.Factor}");
        return string.Create(CultureInfo.InvariantCulture, $"rope {rope.Type.ToString().ToLowerInvariant()}, theta {rope.Theta}{scaled}");
    }

    private static string Digits(IFormattable number) => number.ToString("N0", CultureInfo.InvariantCulture);

    private static void List(string title, string[] tensors)
    {
        if (tensors.Length == 0) return;
        Console.WriteLine();
        Console.WriteLine($"{tensors.Length} tensors {title}:");
        foreach (string tensor in tensors.Take(TensorsListed)) Console.WriteLine($"  {tensor}");
        if (tensors.Length > TensorsListed) Console.WriteLine($"  and {tensors.Length - TensorsListed} more");
    }

    private static void Print(params ReadOnlySpan<(string Name, string Value)> facts)
    {
        Grid grid = new Grid().AddColumn(new GridColumn().NoWrap()).AddColumn();
        foreach ((string name, string value) in facts) grid.AddRow(Markup.Escape(name), Markup.Escape(value));
        AnsiConsole.Write(grid);
    }
}
