using System.Runtime.InteropServices;
using System.Text.Json;
using Rollout.Client.Torch;
using Rollout.Examples.Grpo;
using TorchSharp;
using Xunit;
using static TorchSharp.torch;

namespace Rollout.Client.Tests;

public sealed class PolicyTests
{
    static PolicyTests() => TorchNative.EnsureLoaded();

    [Fact]
    public void Equals_Hugging_Face()
    {
        string folder = GoldenFolder();
        using DisposeScope scope = NewDisposeScope();
        using IDisposable _ = no_grad();
        using Policy policy = Load(folder);
        Dictionary<string, Tensor> golden = ReadSafetensors(Path.Combine(folder, "golden.safetensors"));
        using JsonDocument document = JsonDocument.Parse(File.ReadAllText(Path.Combine(folder, "golden.json")));
        long[][] prompts = document.RootElement.GetProperty("prompts").EnumerateArray()
            .Select(p => p.EnumerateArray().Select(t => t.GetInt64()).ToArray()).ToArray();
        Assert.NotEmpty(prompts);
        for (int i = 0; i < prompts.Length; i++)
        {
            Tensor logits = policy.forward(tensor(prompts[i]).unsqueeze(0)).squeeze(0);
            float difference = (logits - golden[$"logits.{i}"]).abs().max().item<float>();
            Assert.True(difference < 2e-3, $"prompt {i}: logits differ by {difference}");
        }
    }

    [Fact]
    public void A_folder_written_and_read_is_the_same_model()
    {
        string folder = Directory.CreateTempSubdirectory("rollout-test-").FullName;
        try
        {
            using DisposeScope scope = NewDisposeScope();
            using IDisposable _ = no_grad();
            using Policy policy = new(
                new PolicyConfig { VocabSize = ArithmeticTask.VocabSize, NumHiddenLayers = 2, HiddenSize = 64 });
            using (MasterWeights weights = new(policy))
                HuggingFaceFolder.Write(folder, policy);
            using Policy again = Load(folder);
            Tensor tokens = tensor([.. ArithmeticTask.Encode("12+34=").Select(t => (long)t)]).unsqueeze(0);
            Assert.Equal(policy.Config, again.Config);
            Assert.Equal(policy.forward(tokens).data<float>().ToArray(), again.forward(tokens).data<float>().ToArray());
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    [Fact]
    public void The_tokenizer_has_one_token_for_every_byte_and_one_that_ends()
    {
        string folder = Directory.CreateTempSubdirectory("rollout-test-").FullName;
        try
        {
            using Policy policy = new(
                new PolicyConfig { VocabSize = ArithmeticTask.VocabSize, NumHiddenLayers = 1, HiddenSize = 32 });
            HuggingFaceFolder.Write(folder, policy);
            using JsonDocument document = JsonDocument.Parse(File.ReadAllText(Path.Combine(folder, "tokenizer.json")));
            Dictionary<string, int> vocabulary = document.RootElement.GetProperty("model").GetProperty("vocab").EnumerateObject()
                .ToDictionary(p => p.Name, p => p.Value.GetInt32());
            Assert.Equal(Enumerable.Range(0, 256), vocabulary.Values.Order());
            Assert.Equal(ArithmeticTask.Encode("0+="), new[] { vocabulary["0"], vocabulary["+"], vocabulary["="] });
            Assert.Equal(' ', vocabulary["Ġ"]);
            Assert.Equal('\n', vocabulary["Ċ"]);
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    private static Policy Load(string folder)
    {
        using JsonDocument document = JsonDocument.Parse(File.ReadAllText(Path.Combine(folder, "config.json")));
        JsonElement json = document.RootElement;
        int Number(string name) => json.GetProperty(name).GetInt32();
        Policy policy = new(new PolicyConfig
        {
            VocabSize = Number("vocab_size"),
            HiddenSize = Number("hidden_size"),
            IntermediateSize = Number("intermediate_size"),
            NumHiddenLayers = Number("num_hidden_layers"),
            NumAttentionHeads = Number("num_attention_heads"),
            NumKeyValueHeads = Number("num_key_value_heads"),
            HeadDim = Number("head_dim"),
            MaxPositionEmbeddings = Number("max_position_embeddings"),
            RmsNormEps = json.GetProperty("rms_norm_eps").GetDouble(),
            RopeTheta = json.GetProperty("rope_parameters").GetProperty("rope_theta").GetDouble(),
            TieWordEmbeddings = json.GetProperty("tie_word_embeddings").GetBoolean(),
        });
        Dictionary<string, Tensor> tensors = ReadSafetensors(Path.Combine(folder, "model.safetensors"));
        Assert.Equal(tensors.Keys.Order(), TorchStateDict.Of(policy).Select(t => t.Name).Order());
        foreach ((string name, TorchSharp.Modules.Parameter parameter) in policy.named_parameters())
        {
            Assert.Equal(tensors[name].shape, parameter.shape);
            parameter.copy_(tensors[name]);
        }

        return policy;
    }

    private static Dictionary<string, Tensor> ReadSafetensors(string path)
    {
        byte[] bytes = File.ReadAllBytes(path);
        int length = (int)BitConverter.ToInt64(bytes);
        using JsonDocument document = JsonDocument.Parse(bytes.AsMemory(8, length));
        Dictionary<string, Tensor> tensors = new();
        foreach (JsonProperty property in document.RootElement.EnumerateObject().Where(p => p.Name != "__metadata__"))
        {
            int[] offsets = property.Value.GetProperty("data_offsets").EnumerateArray().Select(o => o.GetInt32()).ToArray();
            Span<byte> data = bytes.AsSpan(8 + length + offsets[0], offsets[1] - offsets[0]);
            float[] values = property.Value.GetProperty("dtype").GetString() switch
            {
                "F32" => MemoryMarshal.Cast<byte, float>(data).ToArray(),
                "BF16" => [.. MemoryMarshal.Cast<byte, ushort>(data).ToArray().Select(b => BitConverter.UInt32BitsToSingle((uint)b << 16))],
                var other => throw new NotSupportedException(other),
            };
            tensors[property.Name] = tensor(values).reshape(
                [.. property.Value.GetProperty("shape").EnumerateArray().Select(s => s.GetInt64())]);
        }

        return tensors;
    }

    // tests/golden, looked for upwards from the build output.
    private static string GoldenFolder()
    {
        for (DirectoryInfo? at = new(AppContext.BaseDirectory); at is not null; at = at.Parent)
        {
            string folder = Path.Combine(at.FullName, "tests", "golden", "qwen3");
            if (Directory.Exists(folder))
                return folder;
        }

        throw new DirectoryNotFoundException($"no tests/golden/qwen3 above {AppContext.BaseDirectory}");
    }
}
