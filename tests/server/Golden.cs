using System.Text.Json;
using Rollout.Engine;

namespace Rollout.Server.Tests;

/// <summary>The tiny random models of tests/golden, with the outputs of Hugging Face transformers.</summary>
internal static class Golden
{
    /// <summary>Between two fp32 implementations with different orders of summation.</summary>
    public const double Tolerance = 1e-4;

    public sealed record Case(uint[] Prompt, uint[] Tokens, float[] LogProbs);

    public static string Root { get; } = Find();

    /// <summary>The folder of a model by its name here, or a path as it is.</summary>
    public static string Folder(string model) => Path.Combine(Root, model);

    public static IReadOnlyList<Case> Cases(string model)
    {
        JsonElement json = JsonDocument.Parse(File.ReadAllBytes(Path.Combine(Folder(model), "golden.json"))).RootElement;
        JsonElement.ArrayEnumerator prompts = json.GetProperty("prompts").EnumerateArray();
        JsonElement.ArrayEnumerator continuations = json.GetProperty("continuations").EnumerateArray();
        return [.. prompts.Zip(continuations, (prompt, continuation) => new Case(
            [.. prompt.EnumerateArray().Select(id => id.GetUInt32())],
            [.. continuation.GetProperty("tokens").EnumerateArray().Select(id => id.GetUInt32())],
            [.. continuation.GetProperty("logprobs").EnumerateArray().Select(value => value.GetSingle())]))];
    }

    /// <summary>A reference tensor of golden.safetensors: the logits at every position of prompt k.</summary>
    public static float[][] Logits(string model, int k)
    {
        using SafetensorsFile file = SafetensorsFile.Open(Path.Combine(Folder(model), "golden.safetensors"));
        TensorInfo info = file.Tensors[$"logits.{k}"];
        byte[] bytes = new byte[info.Bytes];
        file.Read(info, 0, bytes);
        float[] all = new float[info.Elements];
        Buffer.BlockCopy(bytes, 0, all, 0, bytes.Length);
        return [.. all.Chunk((int)info.Shape[1])];
    }

    private static string Find()
    {
        for (DirectoryInfo? at = new(AppContext.BaseDirectory); at is not null; at = at.Parent)
        {
            string golden = Path.Combine(at.FullName, "tests", "golden");
            if (Directory.Exists(golden)) return golden;
        }

        throw new DirectoryNotFoundException($"tests/golden is not above {AppContext.BaseDirectory}");
    }
}
